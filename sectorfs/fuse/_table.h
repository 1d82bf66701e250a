/* Tables by number: nodes that their owner allocates, in chains. */
#ifndef SECTORFS_TABLE_H
#define SECTORFS_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

struct node {
    uint64_t key;
    struct node *next;
};

struct table {
    struct node **slots;
    unsigned bits;
    size_t count;
};

/* Where the pointer to a node is, or would be put: NULL stands there then. */
static inline struct node **find(const struct table *table, uint64_t key)
{
    static struct node *none = NULL;
    struct node **place;

    if (table->slots == NULL)
        return &none;
    place = &table->slots[key * UINT64_C(0x9e3779b97f4a7c15) >> (64 - table->bits)];
    while (*place != NULL && (*place)->key != key)
        place = &(*place)->next;
    return place;
}

static inline bool grow(struct table *table)
{
    struct table wider = {.bits = table->slots == NULL ? 6 : table->bits + 1};

    wider.slots = calloc((size_t)1 << wider.bits, sizeof *wider.slots);
    if (wider.slots == NULL)
        return table->slots != NULL; /* longer chains will do */
    for (size_t i = 0; table->slots != NULL && i < (size_t)1 << table->bits; i++)
        for (struct node *node = table->slots[i], *next; node != NULL; node = next) {
            struct node **place = find(&wider, node->key);

            next = node->next;
            node->next = NULL;
            *place = node;
        }
    free(table->slots);
    table->slots = wider.slots;
    table->bits = wider.bits;
    return true;
}

/* Put in a node whose key is not there yet. */
static inline bool insert(struct table *table, struct node *node)
{
    struct node **place;

    if (table->slots == NULL || table->count >> table->bits != 0)
        if (!grow(table))
            return false;
    place = find(table, node->key);
    node->next = NULL;
    *place = node;
    table->count++;
    return true;
}

static inline struct node *take(struct table *table, uint64_t key)
{
    struct node **place = find(table, key), *node = *place;

    if (node != NULL) {
        *place = node->next;
        table->count--;
    }
    return node;
}

static inline void clear(struct table *table)
{
    for (size_t i = 0; table->slots != NULL && i < (size_t)1 << table->bits; i++)
        for (struct node *node = table->slots[i], *next; node != NULL; node = next) {
            next = node->next;
            free(node);
        }
    free(table->slots);
    *table = (struct table){0};
}

#endif

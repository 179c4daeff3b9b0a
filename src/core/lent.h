/*
 * A buffer whose first piece is lent: memory of its user, who has it near what
 * else he writes.  It grows out of that like any other, by malloc.
 */
#ifndef AFORK_LENT_H
#define AFORK_LENT_H

#include <stdlib.h>
#include <string.h>

/* As realloc; of what is lent the first used bytes are copied. */
static inline void *
afork_lent_grow(void *p, const void *lent, size_t used, size_t size)
{
    void *more;

    if (!p || p != lent)
        return realloc(p, size);
    more = malloc(size);
    if (more)
        memcpy(more, p, used);
    return more;
}

static inline void
afork_lent_free(void *p, const void *lent)
{
    if (p != lent)
        free(p);
}

#endif

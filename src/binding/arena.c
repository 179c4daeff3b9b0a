/*
 * Where a template's Python objects live: slabs that the kernel can back with
 * huge pages from birth.
 *
 * CPython maps each arena (1 MiB) by itself, wherever the kernel likes: such a
 * heap is never made of huge pages.  Here arenas come out of slabs that are
 * aligned to one.  The first slab is small and has ordinary pages: a lean
 * template would only lose, as every worker would split the one huge page that
 * it has.  Whether the template has grown enough is seen at its first fork,
 * see memory.c.
 */
#define _GNU_SOURCE
#include "binding.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "hugepage.h"

#define UNIT ((size_t)256 << 10) /* arenas are multiples of it */
#define FIRST ((size_t)16 << 20)
#define SLAB ((size_t)64 << 20)
#define UNITS (SLAB / UNIT)
#define SLABS 1024 /* 64 GiB; what comes after is CPython's as before */

struct slab {
    char *base;
    size_t units;
    size_t taken; /* of units */
    unsigned char map[UNITS];
};

static struct {
    pid_t pid; /* of whom they are: a child has no new ones before it runs code
                  as a template.  Else each would write that it is one */
    PyObjectArenaAllocator theirs; /* for what does not fit, and to free it */
    size_t n;
    size_t first;  /* from here on; those before are shared with a parent */
    size_t bytes;  /* in arenas that were handed out here */
    size_t arenas; /* number of them */
    struct slab *slabs[SLABS];
} own;

/* Maps a slab of at most size bytes; NULL without memory for it. */
static struct slab *
slab_new(size_t size)
{
    struct slab *slab = PyMem_RawCalloc(1, sizeof *slab);
    char *start, *base;
    size_t before;

    if (!slab)
        return NULL;
    start = mmap(NULL, size + AFORK_HUGE_SIZE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        PyMem_RawFree(slab);
        return NULL;
    }
    before = -(uintptr_t)start & (AFORK_HUGE_SIZE - 1);
    base = start + before;
    if (before)
        munmap(start, before);
    munmap(base + size, AFORK_HUGE_SIZE - before);
    if (own.n > own.first)
        madvise(base, size, MADV_HUGEPAGE);
    slab->base = base;
    slab->units = size / UNIT;
    own.slabs[own.n] = slab;
    /* Other interpreters look for theirs here without our GIL. */
    __atomic_store_n(&own.n, own.n + 1, __ATOMIC_RELEASE);
    return slab;
}

/* First place of n free units, or SIZE_MAX. */
static size_t
slab_find(const struct slab *slab, size_t n)
{
    size_t run = 0;

    if (slab->units - slab->taken < n)
        return SIZE_MAX;
    for (size_t i = 0; i < slab->units; i++) {
        run = slab->map[i] ? 0 : run + 1;
        if (run == n)
            return i + 1 - n;
    }
    return SIZE_MAX;
}

static void *
slab_alloc(struct slab *slab, size_t n)
{
    size_t at = slab_find(slab, n);

    if (at == SIZE_MAX)
        return NULL;
    memset(slab->map + at, 1, n);
    slab->taken += n;
    own.bytes += n * UNIT;
    own.arenas++;
    return slab->base + at * UNIT;
}

/*
 * An interpreter with a GIL of its own has its own arenas, too, and would take
 * them out of the slabs while we do.
 */
static int
is_ours(void)
{
    return PyInterpreterState_Get() == PyInterpreterState_Main();
}

static void *
arena_alloc(void *ctx, size_t size)
{
    size_t n = size / UNIT;
    struct slab *slab;
    void *arena;

    (void)ctx;
    /* Pieces of the interpreter's stack come here as well, and are small. */
    if (size % UNIT || !n || n > UNITS || !is_ours() || getpid() != own.pid)
        return own.theirs.alloc(own.theirs.ctx, size);
    for (size_t i = own.n; i-- > own.first;)
        if ((arena = slab_alloc(own.slabs[i], n)))
            return arena;
    slab = own.n < SLABS ? slab_new(own.n > own.first ? SLAB : FIRST) : NULL;
    arena = slab ? slab_alloc(slab, n) : NULL;
    return arena ? arena : own.theirs.alloc(own.theirs.ctx, size);
}

static struct slab *
slab_of(const char *at)
{
    size_t slabs = __atomic_load_n(&own.n, __ATOMIC_ACQUIRE);

    for (size_t i = 0; i < slabs; i++) {
        struct slab *slab = own.slabs[i];

        if (at >= slab->base && at < slab->base + slab->units * UNIT)
            return slab;
    }
    return NULL;
}

static void
arena_free(void *ctx, void *arena, size_t size)
{
    struct slab *slab = slab_of(arena);

    (void)ctx;
    if (!slab) { /* older than we are, or not for us */
        own.theirs.free(own.theirs.ctx, arena, size);
        return;
    }
    memset(slab->map + (size_t)((char *)arena - slab->base) / UNIT, 0,
           size / UNIT);
    slab->taken -= size / UNIT;
    own.bytes -= size;
    own.arenas--;
    /* The addresses are kept.  The memory is not, unless it is that of a file
     * (heapfile.h): then only what was written since is given back. */
    madvise(arena, size, MADV_DONTNEED);
}

void
binding_arena_install(void)
{
    PyObjectArenaAllocator ours = {NULL, arena_alloc, arena_free};

    if (own.pid)
        return;
    PyObject_GetArenaAllocator(&own.theirs);
    PyObject_SetArenaAllocator(&ours);
    own.pid = getpid();
}

void
binding_arena_own(void)
{
    if (!own.pid || own.pid == getpid())
        return;
    own.pid = getpid();
    own.first = own.n;
}

int
binding_arena_holds(const void *at)
{
    return slab_of(at) != NULL;
}

size_t
binding_arena_count(size_t *ret_bytes)
{
    *ret_bytes = own.bytes;
    return own.arenas;
}

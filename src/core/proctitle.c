/*
 * The name that ps shows.
 *
 * Linux shows the memory between arg_start and arg_end of the process, which
 * the process may write.  Where it lies is asked once and inherited by fork.
 */
#define _GNU_SOURCE
#include "proctitle.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static char *area;
static size_t area_size;

/* Fields 48 and 49 of /proc/self/stat, proc(5). */
static int
find_area(void)
{
    char text[2048], *at;
    unsigned long start, end;
    ssize_t n;
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return -errno;
    n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return -EIO;
    text[n] = 0;
    at = strrchr(text, ')'); /* the command name may hold anything */
    for (int field = 2; at && field < 48; field++)
        at = strchr(at + 1, ' ');
    if (!at)
        return -EIO;
    start = strtoul(at, &at, 10);
    end = strtoul(at, NULL, 10);
    if (!start || end <= start)
        return -ENOENT; /* hidden from us, or no arguments */
    area = (char *)start;
    area_size = end - start;
    return 0;
}

int
afork_proctitle_set(const char *title, size_t len)
{
    char name[16] = "";
    int r;

    if (!area) {
        r = find_area();
        if (r < 0)
            return r;
    }
    /*
     * Without spaces: it stands in /proc/PID/stat, which programs split at
     * spaces (CPython among them, to count threads before a fork).
     */
    for (size_t i = 0, n = 0; i < len && n < 15; i++)
        if (title[i] != ' ')
            name[n++] = title[i];
    prctl(PR_SET_NAME, name, 0, 0, 0);
    /* The last byte stays NUL: otherwise ps goes on into the environment. */
    if (len > area_size - 1)
        len = area_size - 1;
    memcpy(area, title, len);
    memset(area + len, 0, area_size - len);
    return 0;
}

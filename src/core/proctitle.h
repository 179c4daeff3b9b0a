/* The name that ps shows. */
#ifndef AFORK_PROCTITLE_H
#define AFORK_PROCTITLE_H

#include "base.h"

/* Overwrites the argument area of this process, cut to its size, and its
 * thread name (15 bytes).  -errno if the area cannot be found. */
int afork_proctitle_set(const char *title, size_t len);

#endif

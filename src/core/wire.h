/*
 * The bytes: frame headers, string lists and the letters (docs/protocol.rst).
 *
 * Pure functions over memory: no I/O, no allocation.
 */
#ifndef AFORK_WIRE_H
#define AFORK_WIRE_H

#include "base.h"

/*
 * Commands, application to process.  The first five are AnyEvent::Fork's
 * and all that a plain server knows; the others are only sent to a process
 * that was started in afork mode.
 */
#define AFORK_COMMANDS(X)                                                    \
    X(EVAL, 'e', "code and byte arguments, a string list")                   \
    X(ARGS, 'a', "byte arguments, a string list")                            \
    X(HANDLE, 'h', "a descriptor follows, on a NUL byte of its own")         \
    X(FORK, 'f', "fork; the last pending argument is the new socket")        \
    X(RUN, 'r', "the function to enter")                                     \
    X(EVAL_TYPED, 'E', "code, then arguments, each behind 'b' or 't'")       \
    X(TEXT, 't', "text arguments, a string list in UTF-8")                   \
    X(IMPORT, 'm', "modules to import, a string list")                       \
    X(SET, 's', "settings, a string list of key, value, key, value ...")     \
    X(FORK_ID, 'F', "uint64 id; the new socket rides on the first byte")     \
    X(FORK_MANY, 'M', "uint64 ids: fork each, on pairs made by the process") \
    X(SPARES, 'w', "uint32 n: keep so many forks in advance")                \
    X(STATS, 'q', "uint64 token: answer with what is known of it")           \
    X(READY, 'y', "uint64 token: answer with done when all before it ran")   \
    X(EXEC, 'x', "become a program")                                         \
    X(SPAWN, 'X', "uint64 id, then as exec: start a program")

/* Reports, process to application; only in afork mode. */
#define AFORK_REPORTS(X)                                                      \
    X(STARTED, 'p', "uint32 pid; its pidfd on the first byte")                \
    X(STARTED_BARE, 'n', "uint32 pid; no pidfd could be made")                \
    X(ERROR, 'e', "stage, errno, type, message, traceback, filename")         \
    X(RUNNING, 'r', "the function is entered; all later bytes are its own")   \
    X(SOCKET, 'c', "uint64 id; our end of its socket on the first byte")      \
    X(EXITED, 'x', "uint64 id, uint32 pid, int32 status, 18 int64 of rusage") \
    X(DONE, 'd', "uint64 token")                                              \
    X(STATS, 'q', "uint64 token, a string list of keys and values")           \
    X(FAILED, 'f', "uint64 id, int32 errno, uint8 stage: no such process")    \
    X(SPAWNED, 's', "uint64 id, uint32 pid; its pidfd on the first byte")     \
    X(SPAWNED_BARE, 'b', "uint64 id, uint32 pid; no pidfd could be made")

#define AFORK_LETTER(name, letter, text) AFORK_CMD_##name = letter,
enum afork_command { AFORK_COMMANDS(AFORK_LETTER) };
#undef AFORK_LETTER
#define AFORK_LETTER(name, letter, text) AFORK_REP_##name = letter,
enum afork_report { AFORK_REPORTS(AFORK_LETTER) };
#undef AFORK_LETTER

/* Which end of the conversation a reader listens to. */
enum afork_direction { AFORK_TO_PROCESS, AFORK_TO_APPLICATION };

/*
 * Where the descriptor of a frame of that letter rides.  The original's way
 * costs two sends and wakes the receiver twice, so our own frames carry
 * theirs on the first byte.
 */
enum afork_carry {
    AFORK_CARRY_NONE,
    AFORK_CARRY_BEHIND, /* on a NUL byte of its own, behind the frame */
    AFORK_CARRY_FIRST,  /* on the first byte of the frame */
};
enum afork_carry afork_wire_carry(enum afork_direction direction,
                                  uint8_t letter);

void afork_wire_put_head(uint8_t head[AFORK_HEAD_SIZE], uint8_t letter,
                         uint32_t len);
uint32_t afork_wire_head_len(const uint8_t head[AFORK_HEAD_SIZE]);

/* Bytes needed for n as a BER compressed integer, 1 to 5. */
size_t afork_wire_ber_size(uint32_t n);
/* Writes n, returns the bytes used. */
size_t afork_wire_put_ber(uint8_t *at, uint32_t n);
/* Reads one from [at, end); returns the bytes used or -EPROTO: cut short,
 * above 32 bits, or not in its shortest form. */
int afork_wire_get_ber(const uint8_t *at, const uint8_t *end, uint32_t *ret_n);

/* A string of bytes inside somebody else's memory. */
struct afork_str {
    const uint8_t *data;
    size_t len;
};

/* A walk over a string list. */
struct afork_strs {
    const uint8_t *at;
    const uint8_t *end;
};

/* The next string: 1 and *ret_str, 0 at the end, -EPROTO if malformed. */
int afork_wire_next(struct afork_strs *list, struct afork_str *ret_str);

/* Length of a string list, and writing it; -E2BIG above 32 bits. */
int64_t afork_wire_list_size(const struct afork_str *strs, size_t n);
void afork_wire_put_list(uint8_t *at, const struct afork_str *strs, size_t n);

#endif

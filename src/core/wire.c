/* The bytes: frame headers, string lists and the letters. */
#include "wire.h"

#include <errno.h>
#include <string.h>

enum afork_carry
afork_wire_carry(enum afork_direction direction, uint8_t letter)
{
    if (direction == AFORK_TO_PROCESS) {
        if (letter == AFORK_CMD_HANDLE)
            return AFORK_CARRY_BEHIND;
        return letter == AFORK_CMD_FORK_ID ? AFORK_CARRY_FIRST
                                           : AFORK_CARRY_NONE;
    }
    return letter == AFORK_REP_STARTED || letter == AFORK_REP_SPAWNED ||
                   letter == AFORK_REP_SOCKET
               ? AFORK_CARRY_FIRST
               : AFORK_CARRY_NONE;
}

void
afork_wire_put_head(uint8_t head[AFORK_HEAD_SIZE], uint8_t letter,
                    uint32_t len)
{
    head[0] = letter;
    memcpy(head + 1, &len, sizeof len); /* native order, as the original */
}

uint32_t
afork_wire_head_len(const uint8_t head[AFORK_HEAD_SIZE])
{
    uint32_t len;

    memcpy(&len, head + 1, sizeof len);
    return len;
}

size_t
afork_wire_ber_size(uint32_t n)
{
    size_t size = 1;

    while (n >>= 7)
        size++;
    return size;
}

size_t
afork_wire_put_ber(uint8_t *at, uint32_t n)
{
    size_t size = afork_wire_ber_size(n);

    for (size_t i = size; i-- > 0; n >>= 7)
        at[i] = (uint8_t)((n & 0x7f) | (i + 1 < size ? 0x80 : 0));
    return size;
}

int
afork_wire_get_ber(const uint8_t *at, const uint8_t *end, uint32_t *ret_n)
{
    uint64_t n = 0;

    if (at < end && *at == 0x80)
        return -EPROTO; /* leading zero group */
    for (int used = 0; used < 5 && at + used < end; used++) {
        n = n << 7 | (at[used] & 0x7f);
        if (n > UINT32_MAX)
            return -EPROTO;
        if (!(at[used] & 0x80)) {
            *ret_n = (uint32_t)n;
            return used + 1;
        }
    }
    return -EPROTO;
}

int
afork_wire_next(struct afork_strs *list, struct afork_str *ret_str)
{
    uint32_t len;
    int used;

    if (list->at == list->end)
        return 0;
    used = afork_wire_get_ber(list->at, list->end, &len);
    if (used < 0)
        return used;
    /* The original truncates here; a length that lies is a broken peer. */
    if (len > (size_t)(list->end - list->at) - (size_t)used)
        return -EPROTO;

    ret_str->data = list->at + used;
    ret_str->len = len;
    list->at = ret_str->data + len;
    return 1;
}

int64_t
afork_wire_list_size(const struct afork_str *strs, size_t n)
{
    uint64_t size = 0;

    for (size_t i = 0; i < n; i++) {
        if (strs[i].len > UINT32_MAX)
            return -E2BIG;
        size += afork_wire_ber_size((uint32_t)strs[i].len) + strs[i].len;
        if (size > UINT32_MAX)
            return -E2BIG;
    }
    return (int64_t)size;
}

void
afork_wire_put_list(uint8_t *at, const struct afork_str *strs, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        at += afork_wire_put_ber(at, (uint32_t)strs[i].len);
        if (strs[i].len)
            memcpy(at, strs[i].data, strs[i].len);
        at += strs[i].len;
    }
}

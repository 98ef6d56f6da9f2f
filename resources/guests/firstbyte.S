/*
 * Stores one byte to the UART as soon as it runs, and powers off. The benchmark uses it, in a
 * padded image, to measure how soon a guest runs.
 * rvmm: one byte of output, exit status 0.
 */
#include "header.inc"

#define UART        0x10000000

guest_entry:
    li      t0, UART
    li      t1, '!'
    sb      t1, 0(t0)
    system_reset SRST_SHUTDOWN, SRST_NO_REASON

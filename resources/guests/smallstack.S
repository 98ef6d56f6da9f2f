/*
 * A function that calls itself too often, on a small stack at the start of RAM. What it stores
 * below RAM is lost, and what it loads there is all ones. So it returns to an address without
 * memory, and the trap handler waits for ever.
 * rvmm: ends only by a signal. A report names the stack.
 */
#include "common.inc"

#define STACK   0x400
#define CALLS   100

main:
    print   "calling\n"
    on_trap wait
    li      sp, RAM + STACK
    li      a0, CALLS
    call    down
    j       power_off

down:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    addi    a0, a0, -1
    beqz    a0, 1f
    call    down
1:  ld      ra, 8(sp)
    /* Stay on this side: the handler shall find the stack as it is at the fault. */
    ret

    /* Without a stack: a line with one letter, and then nothing. */
    .balign 4
wait:
    li      a0, '!'
    sbi     SBI_DBCN, SBI_DBCN_WRITE_BYTE
    li      a0, '\n'
    sbi     SBI_DBCN, SBI_DBCN_WRITE_BYTE
1:  wfi
    j       1b

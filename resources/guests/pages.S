/*
 * Measures the first touch of memory: stores one word to each 4 KiB page of 128 MiB of RAM,
 * starting at its 64th MiB, and prints `pages: COUNT TICKS` through the UART, with TICKS of the
 * guest's timer. Needs 256 MiB of RAM.
 * rvmm: exit status 0.
 */
#include "common.inc"

#define START       (RAM + (64 << 20))
#define COUNT       32768
#define PAGE        4096

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      t0, START
    li      t1, COUNT
    li      t2, PAGE
    rdtime  t3
1:  sd      t0, 0(t0)
    add     t0, t0, t2
    addi    t1, t1, -1
    bnez    t1, 1b
    rdtime  s2
    sub     s2, s2, t3
    uart_print "pages: "
    li      a0, COUNT
    call    uart_dec
    uart_print " "
    mv      a0, s2
    call    uart_dec
    uart_print "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

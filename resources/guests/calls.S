/*
 * A guest in C, for a debugger: see calls.c. This file has its entry and its console.
 * rvmm: `total 385`, exit status 0.
 */
#include "common.inc"

    .globl  main, done

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      a0, 10
    call    sum_of_squares
    mv      s2, a0
    print   "total "
    mv      a0, s2
    call    print_dec
    print   "\n"
done:
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/*
 * Tells who its SBI says made the hart.
 * rvmm: one line, exit status 0.
 */
#include "common.inc"

#define SBI_BASE_MVENDORID  4
#define SBI_BASE_MARCHID    5
#define SBI_BASE_MIMPID     6

/* Print \name=, and what BASE's function \fid answers. */
.macro tell name, fid
    print   "\name="
    sbi     SBI_BASE, \fid
    mv      a0, a1
    call    print_hex
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    tell    mvendorid, SBI_BASE_MVENDORID
    tell    " marchid", SBI_BASE_MARCHID
    tell    " mimpid", SBI_BASE_MIMPID
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

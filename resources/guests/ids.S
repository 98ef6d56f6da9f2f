/*
 * Prints the IDs of the hart's maker, as its SBI reports them.
 * rvmm: one line, exit status 0.
 */
#include "common.inc"

#define SBI_BASE_MVENDORID  4
#define SBI_BASE_MARCHID    5
#define SBI_BASE_MIMPID     6

/* Print \name= and the answer of BASE's function \fid. */
.macro report name, fid
    print   "\name="
    sbi     SBI_BASE, \fid
    mv      a0, a1
    call    print_hex
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    report  mvendorid, SBI_BASE_MVENDORID
    report  " marchid", SBI_BASE_MARCHID
    report  " mimpid", SBI_BASE_MIMPID
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

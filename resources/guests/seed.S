/*
 * Reads the entropy source (Zkr) 16 times. If the host's harts have Zkr, KVM leaves the answer to
 * rvmm, and cannot hide Zkr from a guest. If the guest has no Zkr, the access is an illegal
 * instruction (see illegal.S).
 * rvmm: exit status 0.
 */
#include "common.inc"

#define CSR_SEED    0x015
#define OPST_ES16   2               /* bits 31:30: 16 bits of entropy are in bits 15:0 */

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    li      s2, 16
    li      s3, 0                   /* all that came, or-ed */
1:  csrrw   s4, CSR_SEED, zero
    srliw   t0, s4, 30
    li      t1, OPST_ES16
    bne     t0, t1, fail
    slli    s4, s4, 48
    or      s3, s3, s4
    addi    s2, s2, -1
    bnez    s2, 1b

    beqz    s3, fail
    print   "seed: es16\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

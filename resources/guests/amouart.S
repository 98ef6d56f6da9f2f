/*
 * An atomic instruction on the UART's registers. KVM decodes only plain loads and stores.
 * rvmm: exit status 122.
 */
#include "common.inc"

main:
    print   "amo\n"
    li      t0, UART
    li      t1, 'x'
    amoswap.w t2, t1, (t0)
    print   "amo: went on\n"
    ret

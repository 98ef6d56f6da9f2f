/*
 * An atomic instruction at an address without memory. On every kernel KVM decodes only plain loads
 * and stores: KVM_RUN fails with EOPNOTSUPP, and the guest cannot go on.
 * rvmm: exit status 122.
 */
#include "common.inc"

main:
    print   "amo\n"
    li      t0, NOWHERE
    li      t1, 1
    amoadd.w t2, t1, (t0)
    print   "amo: went on\n"
    ret

/*
 * Says so and spins for ever, without an exit that rvmm could notice a signal at.
 * rvmm: ends by a signal only.
 */
#include "common.inc"

main:
    print   "spinning\n"
1:  j       1b

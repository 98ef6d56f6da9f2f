/*
 * Says so and sleeps for ever: no interrupt is enabled, so its hart lies blocked in the host's kernel.
 * rvmm: ends by a signal only.
 */
#include "common.inc"

main:
    print   "idle\n"
1:  wfi
    j       1b

/*
 * Prints a line and sleeps forever. No interrupt is enabled, so its hart is blocked in the host's
 * kernel.
 * rvmm: ends only by a signal.
 */
#include "common.inc"

main:
    print   "idle\n"
1:  wfi
    j       1b

/*
 * Prints a line and spins forever, without an exit at which rvmm could notice a signal.
 * rvmm: ends only by a signal.
 */
#include "common.inc"

main:
    print   "spinning\n"
1:  j       1b

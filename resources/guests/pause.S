/*
 * Checks the results of its exits while the machine is paused and resumed.
 * rvmm: exit status 0 once a byte is typed.
 */
#include "pause.inc"

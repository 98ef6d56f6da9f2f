/*
 * Asks for a cold reboot.
 * rvmm: exit status 120, an empty console.
 */
#include "header.inc"

guest_entry:
    system_reset SRST_COLD_REBOOT, SRST_NO_REASON

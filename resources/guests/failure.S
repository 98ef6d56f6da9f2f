/*
 * Shuts down for the reason "system failure".
 * rvmm: exit status 121, an empty console.
 */
#include "header.inc"

guest_entry:
    system_reset SRST_SHUTDOWN, SRST_FAILURE

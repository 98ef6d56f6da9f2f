/*
 * The simplest guest there is: its only act is the SBI call that shuts the machine down.
 * rvmm: exit status 0, an empty console.
 */
#include "header.inc"

guest_entry:
    system_reset SRST_SHUTDOWN, SRST_NO_REASON

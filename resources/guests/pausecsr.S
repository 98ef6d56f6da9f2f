/*
 * The same with a CSR: stopei, which KVM hands to userspace on a host with AIA whose guest has
 * none.
 * rvmm, with --irqchip plic: exit status 0 once a byte is typed.
 */
#define CSR 0x15c
#include "pause.inc"

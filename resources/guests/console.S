/*
 * Checks its initial registers, writes to the console in every way, and prints the result of each
 * call. A hostile DBCN call is refused as a whole: not one byte of it reaches the console. Needs
 * 128 MiB of RAM, because the hostile arguments cross its end.
 * rvmm: exit status 0, the lines in tests/every_host/guests.rs.
 */
#include "common.inc"

#define RAM_END     (RAM + (128 << 20))
#define KEPT        0x5eed5eed

    .section .rodata
hello:
    .ascii  "dbcn: hello from DBCN\n"
hello_end:
bytes:
    .asciz  "byte: hello by write_byte\n"
    .balign 8
leak:
    .ascii  "LEAKLEAK"

    .text

/* Call DBCN function \fid with \len, \lo, \hi, and print `\name: <error>`. */
.macro refused name, fid, len, lo, hi
    print   "\name: "
    li      a0, \len
    li      a1, \lo
    li      a2, \hi
    sbi     SBI_DBCN, \fid
    call    print_dec
    print   "\n"
.endm

/* Print ` error=<a0> count=<a1>` and end the line. */
report:
    addi    sp, sp, -32
    sd      ra, 24(sp)
    sd      a1, 16(sp)
    sd      a0, 8(sp)
    print   "error="
    ld      a0, 8(sp)
    call    print_dec
    print   " count="
    ld      a0, 16(sp)
    call    print_dec
    print   "\n"
    ld      ra, 24(sp)
    addi    sp, sp, 32
    ret

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    /* The values that rvmm put into a0 and a1. */
    print   "hart="
    mv      a0, s0
    call    print_dec
    lwu     t0, 0(s1)
    li      t1, 0xedfe0dd0          /* d00dfeed, big endian */
    beq     t0, t1, 1f
    print   " fdt=missing\n"
    j       2f
1:  print   " fdt=ok\n"
2:

    /* One line in each way. */
    lla     a1, hello
    lla     a0, hello_end
    sub     a0, a0, a1
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_WRITE
    call    report

    lla     s2, bytes
    li      s3, 0                   /* all errors, or-ed */
3:  lbu     a0, 0(s2)
    beqz    a0, 4f
    sbi     SBI_DBCN, SBI_DBCN_WRITE_BYTE
    or      s3, s3, a0
    addi    s2, s2, 1
    j       3b
4:  print   "errors="
    mv      a0, s3
    call    print_dec
    print   "\n"

    uart_print "uart: hello from the UART\n"

    /*
     * The legacy call returns an error in a0 only. The host's kernel decides whether it forwards
     * the call.
     */
    print   "putchar: ["
    li      a0, 'X'
    li      a1, KEPT
    sbi     SBI_LEGACY_PUTCHAR, 0
    mv      s2, a0
    mv      s3, a1
    print   "] a0="
    mv      a0, s2
    call    print_dec
    li      t0, KEPT
    beq     s3, t0, 5f
    print   " a1=lost\n"
    j       6f
5:  print   " a1=kept\n"
6:

    /*
     * Ranges that are not in RAM, or only in part. The last 8 bytes of RAM are text, none of which
     * may be printed.
     */
    li      t0, RAM_END - 8
    ld      t1, leak
    sd      t1, 0(t0)
    refused "write address zero",      SBI_DBCN_WRITE, 8, 0, 0
    refused "write below RAM",         SBI_DBCN_WRITE, 16, RAM - 8, 0
    refused "write across the end",    SBI_DBCN_WRITE, 16, RAM_END - 8, 0
    refused "write at the end",        SBI_DBCN_WRITE, 1, RAM_END, 0
    refused "write all and more",      SBI_DBCN_WRITE, (128 << 20) + 1, RAM, 0
    refused "write high half",         SBI_DBCN_WRITE, 8, RAM_END - 8, 1
    refused "write longest",           SBI_DBCN_WRITE, -1, RAM_END - 8, 0
    refused "write wrapping",          SBI_DBCN_WRITE, 16, -8, 0
    refused "write into the UART",     SBI_DBCN_WRITE, 8, UART, 0
    refused "read address zero",       SBI_DBCN_READ, 8, 0, 0
    refused "read across the end",     SBI_DBCN_READ, 16, RAM_END - 8, 0
    refused "read high half",          SBI_DBCN_READ, 8, RAM_END - 8, 1
    refused "read longest",            SBI_DBCN_READ, -1, RAM_END - 8, 0
    refused "read wrapping",           SBI_DBCN_READ, 16, -8, 0

    /* Valid ranges: an empty one, the very last byte, and a read with nothing to read. */
    li      a0, 0
    lla     a1, hello
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_WRITE
    call    report

    li      t0, RAM_END - 1
    li      t1, '\n'
    sb      t1, 0(t0)
    li      a0, 1
    mv      a1, t0
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_WRITE
    call    report

    li      a0, 64
    lla     a1, buffer
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_READ
    call    report

    print   "console: done\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

    .bss
buffer:
    .space  64

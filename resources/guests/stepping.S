/*
 * For a debugger that steps: a loop with branches, calls, short and long instructions, a sequence
 * of LR and SC, and a trap whose handler steps over the instruction. It prints a sum over what it
 * did, so that a step that changes anything is seen. Interrupts are on, and timers fire meanwhile:
 * their handler counts them apart.
 * rvmm: `sum 12100`, exit status 0.
 */
#include "common.inc"

#define ROUNDS      40
#define SBI_TIME    0x54494d45
#define SIE_STIE    0x20
#define SSTATUS_SIE 0x2
#define SOON        20000           /* 2 ms of QEMU's 10 MHz */

    .globl  main, begin, end, handler, triple

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    print   "stepping\n"
    on_trap handler
    call    later
    li      t0, SIE_STIE
    csrw    sie, t0
    csrsi   sstatus, SSTATUS_SIE
    li      s2, 0                   /* the sum */
    li      s3, ROUNDS
    lla     s4, word
    sd      zero, 0(s4)
    .option push
    .option rvc
begin:
    mv      a0, s3
    jal     triple
    add     s2, s2, a0
    lla     t0, triple
    jalr    t0
    add     s2, s2, a0
    /* the trap: a CSR of the hypervisor, which a guest cannot access */
    csrr    t0, 0x680               /* hgatp */
    add     s2, s2, s5              /* scause, from the handler */
sequence:
    lr.w    t1, (s4)
    addi    t1, t1, 1
    sc.w    t2, t1, (s4)
sequence_end:
    bnez    t2, sequence
    andi    t1, s3, 1
    beqz    t1, 2f
    addi    s2, s2, 100
    j       3f
2:  c.addi  s2, 7
3:  addi    s3, s3, -1
    bnez    s3, begin
    .option pop
end:
    csrci   sstatus, SSTATUS_SIE
    csrw    sie, zero
    lw      t0, 0(s4)
    add     s2, s2, t0
    print   "sum "
    mv      a0, s2
    call    print_dec
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* triple(a0) -> a0: three times a0 */
triple:
    slli    a1, a0, 1
    add     a0, a0, a1
    ret

/* Set the timer. Clobbers a0, a1, a6, a7, t0. */
later:
    rdtime  a0
    li      t0, SOON
    add     a0, a0, t0
    sbi     SBI_TIME, 0
    ret

    .balign 4
handler:
    csrrw   s6, sscratch, s6
    csrr    s6, scause
    bltz    s6, 1f
    mv      s5, s6
    csrr    s6, sepc
    addi    s6, s6, 4
    csrw    sepc, s6
    csrrw   s6, sscratch, s6
    sret
1:  /* the timer */
    addi    sp, sp, -48
    sd      a0, 0(sp)
    sd      a1, 8(sp)
    sd      a6, 16(sp)
    sd      a7, 24(sp)
    sd      t0, 32(sp)
    sd      ra, 40(sp)
    call    later
    ld      a0, 0(sp)
    ld      a1, 8(sp)
    ld      a6, 16(sp)
    ld      a7, 24(sp)
    ld      t0, 32(sp)
    ld      ra, 40(sp)
    addi    sp, sp, 48
    csrrw   s6, sscratch, s6
    sret

    .bss
    .balign 8
word:
    .space  8

/*
 * Several harts on one CPU of the host (docs/guests/teach-harts.md). Each hart reads the time in a
 * loop. If much time has passed between two reads, the hart was away: its vCPU's thread did not
 * run. It prints each of its first turns.
 * rvmm: exit status 0. It needs as many busy vCPUs on each CPU of the host as it takes for the
 * scheduler to take the CPU away.
 */
#include "common.inc"
#include "teach.inc"

#define SBI_HSM         0x48534d
#define HSM_HART_START  0
#define HSM_HART_STOP   1

#define AWAY            20000       /* 2 ms of a timer of 10 MHz */
#define TURNS           3
#define HARTS_MAX       8

main:
    lla     tp, lines
    /* Start all other harts. There is none with the number that is refused. */
    li      s1, 1
1:  mv      a0, s1
    lla     a1, other
    li      a2, 0
    sbi     SBI_HSM, HSM_HART_START
    bnez    a0, 2f
    addi    s1, s1, 1
    li      t0, HARTS_MAX
    bltu    s1, t0, 1b
2:  lla     t0, harts
    sd      s1, 0(t0)
    call    take_turns
    say     "all harts have had their turns"
    end_line
    j       power_off

/* Another hart begins here, with its number in a0. */
other:
    mv      s0, a0
    lla     tp, lines
    li      t0, LINE_SIZE
    mul     t0, t0, s0
    add     tp, tp, t0
    lla     t0, unexpected_trap
    csrw    stvec, t0
    call    take_turns
    sbi     SBI_HSM, HSM_HART_STOP
    j       fail

/* take_turns(s0 = number of the hart): returns when all harts have had TURNS turns. */
take_turns:
    mv      s9, ra
    say     "hart "
    say_digit s0
    say     ": up"
    end_line
    lla     s6, harts
    lla     s7, up
    lla     s8, done
    li      t0, 1
    amoadd.d zero, t0, (s7)
    /* hart 0 writes their number after it has started them */
1:  ld      s1, 0(s6)
    ld      t0, 0(s7)
    bne     t0, s1, 1b

    li      s2, 0                   /* turns so far */
    rdtime  s3
2:  rdtime  t0
    sub     t1, t0, s3
    mv      s3, t0
    li      t2, AWAY
    bltu    t1, t2, 3f
    li      t0, TURNS
    bgeu    s2, t0, 3f
    addi    s2, s2, 1
    say     "hart "
    say_digit s0
    say     ": turn "
    say_digit s2
    end_line
    rdtime  s3                      /* the time of the call does not count */
    li      t0, TURNS
    bne     s2, t0, 3f
    li      t0, 1
    amoadd.d zero, t0, (s8)
3:  ld      t0, 0(s8)
    bne     t0, s1, 2b
    mv      ra, s9
    ret

    .bss
    .balign 8
harts:
    .space  8
up:
    .space  8
done:
    .space  8
lines:
    .space  LINE_SIZE * HARTS_MAX

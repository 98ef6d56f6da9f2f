//! Tests the state machine, and what a driver can do to a queue. One device stands for all.

use std::sync::atomic::Ordering;

use super::*;
use crate::util::Half;
use crate::virtio::stop::{Stop, StopFor};
use crate::virtio::testing::*;

mod pause;
mod saved;
mod starts;

/// Sends a valid request of 12 bytes on `queue`.
fn works(driver: &mut Driver, queue: usize) {
    let buffers = [
        (BUFFERS, 4, 0),
        (BUFFERS + 64, 8, WRITE),
        (BUFFERS, 4, WRITE),
    ];
    assert_eq!(driver.request(queue, &buffers), 12);
}

fn buffer(flags: u16, next: u16) -> Desc {
    let (addr, len) = (BUFFERS, 4);
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

/// Lets the driver break queue 0 by `harm`. Checks that the device sets DEVICE_NEEDS_RESET and
/// interrupts the driver, that the other queue still works, and that both work after a reset.
#[track_caller]
fn breaks(harm: impl FnOnce(&mut Driver)) {
    let mut driver = Driver::ready(echo());
    works(&mut driver, 0);
    driver.restart();
    harm(&mut driver);
    driver.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
    works(&mut driver, 1);
    driver.breaks_and_recovers(|d| works(d, 0));
}

#[test]
fn a_request_is_answered_and_told_once() {
    let mut driver = Driver::ready(echo());
    works(&mut driver, 0);
    works(&mut driver, 1);
    driver.wait_until("interrupts", |d| {
        d.interrupts.queues.load(Ordering::Acquire) >= 1
    });
    assert_eq!(driver.interrupts.configs.load(Ordering::Acquire), 0);
}

#[test]
fn hostile_a_chain_that_loops() {
    breaks(|driver| {
        driver.describe(0, 0, buffer(NEXT, 1));
        driver.describe(0, 1, buffer(NEXT, 0));
        driver.offer(0, 0);
    });
}

#[test]
fn hostile_a_descriptor_that_is_its_own_next() {
    breaks(|driver| {
        driver.describe(0, 3, buffer(NEXT | WRITE, 3));
        driver.offer(0, 3);
    });
}

#[test]
fn hostile_a_next_outside_the_table() {
    breaks(|driver| {
        driver.describe(0, 0, buffer(NEXT, SIZE));
        driver.offer(0, 0);
    });
}

#[test]
fn hostile_a_head_outside_the_table() {
    breaks(|driver| driver.offer(0, SIZE));
    breaks(|driver| driver.offer(0, u16::MAX));
}

#[test]
fn hostile_an_index_that_jumps() {
    breaks(|driver| {
        driver.set_avail(0, SIZE + 1);
        driver.core.registers().kick(0);
    });
    breaks(|driver| {
        driver.set_avail(0, u16::MAX);
        driver.core.registers().kick(0);
    });
}

#[test]
fn hostile_a_length_beyond_ram() {
    for (addr, len) in [
        (BUFFERS, u32::MAX),
        (RAM_END - 4, 5),
        (RAM_END, 1),
        (RAM - 1, 2),
        (u64::MAX, 4),
        (u64::MAX - 3, 4),
        (0, 4),
    ] {
        breaks(|driver| {
            let (flags, next) = (WRITE, 0);
            driver.describe(
                0,
                0,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
            driver.offer(0, 0);
        });
    }
}

#[test]
fn hostile_a_chain_longer_than_4_gib() {
    breaks(|driver| {
        for index in 0..4 {
            let (addr, flags, next) = (RAM, if index < 3 { NEXT } else { 0 }, index + 1);
            let len = 0x5555_5556;
            driver.describe(
                0,
                index,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        driver.offer(0, 0);
    });
}

#[test]
fn hostile_readable_behind_writable() {
    breaks(|driver| {
        driver.describe(0, 0, buffer(NEXT | WRITE, 1));
        driver.describe(0, 1, buffer(0, 0));
        driver.offer(0, 0);
    });
}

/// Offers an indirect table of `len` bytes at `addr`, in descriptor 0.
fn indirect(driver: &mut Driver, addr: u64, len: u32) {
    let (flags, next) = (INDIRECT, 0);
    driver.describe(
        0,
        0,
        Desc {
            addr,
            len,
            flags,
            next,
        },
    );
    driver.offer(0, 0);
}

#[test]
fn an_indirect_table_is_followed() {
    let mut driver = Driver::ready(echo());
    driver.describe_at(BUFFERS + 0x1000, 0, buffer(NEXT, 1));
    driver.describe_at(BUFFERS + 0x1000, 1, buffer(WRITE, 0));
    indirect(&mut driver, BUFFERS + 0x1000, 32);
    driver.wait_until("the request", |d| d.used(0) == 1);
    assert_eq!(driver.used_element(0, 0), (0, 4));
}

#[test]
fn hostile_indirect_tables() {
    const TABLE: u64 = BUFFERS + 0x1000;
    // A table within a table: alone, and after a valid descriptor.
    breaks(|driver| {
        let (addr, len, flags, next) = (TABLE, 32, INDIRECT, 0);
        driver.describe_at(
            TABLE,
            0,
            Desc {
                addr,
                len,
                flags,
                next,
            },
        );
        indirect(driver, TABLE, 32);
    });
    breaks(|driver| {
        let (addr, len, flags, next) = (TABLE, 32, INDIRECT, 0);
        driver.describe_at(TABLE, 0, buffer(NEXT, 1));
        driver.describe_at(
            TABLE,
            1,
            Desc {
                addr,
                len,
                flags,
                next,
            },
        );
        indirect(driver, TABLE, 32);
    });
    // A next descriptor outside the table, and a loop in the table.
    breaks(|driver| {
        driver.describe_at(TABLE, 0, buffer(NEXT, 2));
        indirect(driver, TABLE, 32);
    });
    breaks(|driver| {
        driver.describe_at(TABLE, 0, buffer(NEXT, 1));
        driver.describe_at(TABLE, 1, buffer(NEXT, 0));
        indirect(driver, TABLE, 32);
    });
    // Sizes that are invalid, and addresses outside RAM.
    for (addr, len) in [
        (TABLE, 0),
        (TABLE, 15),
        (TABLE, 17),
        (TABLE, !15),
        (RAM_END, 16),
        (RAM_END - 8, 16),
        (u64::MAX - 15, 16),
    ] {
        breaks(|driver| indirect(driver, addr, len));
    }
}

#[test]
fn a_buffer_of_no_bytes_is_nothing() {
    let mut driver = Driver::ready(echo());
    assert_eq!(driver.request(0, &[(BUFFERS, 0, 0), (0, 0, WRITE)]), 0);
    assert_eq!(driver.request(0, &[(u64::MAX, 0, WRITE)]), 0);
    works(&mut driver, 0);
}

#[test]
fn hostile_rings_outside_ram() {
    let [descriptors, available, used] = rings(0);
    for rings in [
        [RAM_END, available, used],
        [descriptors, RAM_END - 8, used],
        [descriptors, available, RAM_END - 16],
        [0, available, used],
        [descriptors, 0, used],
        [descriptors, available, u64::MAX - 7],
        [!15, available, used],
        // Not aligned.
        [descriptors + 8, available, used],
        [descriptors, available + 1, used],
        [descriptors, available, used + 2],
    ] {
        let mut driver = Driver::of(echo());
        driver.negotiate(u64::MAX);
        driver.set_up(0, rings);
        driver.become_ready();
        assert_ne!(driver.status() & BROKEN, 0, "{rings:x?}");
        driver.breaks_and_recovers(|d| works(d, 0));
    }
}

#[test]
fn hostile_sizes_have_no_effect() {
    let mut driver = Driver::of(echo());
    driver.negotiate(u64::MAX);
    for size in [0, 3, 15, 17, 32, u16::MAX] {
        driver.core.registers().set_queue_size(size);
        assert_eq!(
            driver.core.registers().queue().unwrap().size,
            SIZE,
            "{size}"
        );
    }
    driver.core.registers().queue_select = 2;
    driver.core.registers().set_queue_size(8);
    driver.core.registers().enable_queue();
    driver.core.registers().set_ring(Ring::Device, Half::Low, 7);
    assert!(driver.core.registers().queue().is_none());
}

#[test]
fn hostile_notifications_before_the_driver_is_ready() {
    let mut driver = Driver::of(echo());
    for queue in [0, 1, 2, 9999, u16::MAX] {
        driver.core.registers().kick(queue);
    }
    driver.restart();
    works(&mut driver, 0);
}

#[test]
fn hostile_a_reset_at_any_moment() {
    let mut driver = Driver::ready(echo());
    for round in 0u16..200 {
        let (addr, len, flags, next) = (BUFFERS, 4096, WRITE, 0);
        for index in 0..SIZE {
            driver.describe(
                0,
                index,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        for _ in 0..round % SIZE {
            driver.offer(0, round % SIZE);
        }
        driver.restart();
        assert_eq!(driver.used(0), 0, "a used buffer after the reset");
    }
    works(&mut driver, 0);
}

#[test]
fn a_stop_is_heard_before_each_request() {
    let (mut driver, mut queue) = taken(u64::MAX);
    for head in 0..SIZE {
        driver.describe(0, head, buffer(WRITE, 0));
        driver.offer(0, head);
    }
    let stop = Stop::default();
    let mut served = 0;
    let drained = queue.drain(&stop, |_| {
        served += 1;
        if served == 3 {
            stop.ask(StopFor::Reset);
        }
        Ok(4)
    });
    drained.unwrap();
    assert_eq!((served, driver.used(0)), (3, 3));
    let raised = driver.interrupts.queues.load(Ordering::Acquire);
    assert_eq!(raised, 1, "one interrupt for the served requests");
}

#[test]
fn features_are_agreed_on_or_not() {
    let driver = Driver::of(echo());
    driver.core.set_status(3);
    // Accept features that were not offered.
    driver.core.registers().driver_select = 1;
    driver.core.registers().set_driver_features(1 | (1 << 30));
    driver.core.set_status(NEGOTIATED);
    assert_eq!(driver.status(), 3);
    driver.core.registers().set_driver_features(1);
    driver.core.registers().driver_select = 7;
    driver.core.registers().set_driver_features(u32::MAX);
    driver.core.set_status(NEGOTIATED);
    assert_eq!(driver.status(), NEGOTIATED);
    // After FEATURES_OK, changes have no effect.
    driver.core.registers().driver_select = 0;
    driver.core.registers().set_driver_features(u32::MAX);
    assert_eq!(driver.core.registers().driver_features(), 0);
    driver.core.registers().device_select = 2;
    assert_eq!(driver.core.registers().device_features(), 0);
}

/// Small kernels accept only the low 32 features, or none.
#[test]
fn a_driver_may_be_of_before_version_1() {
    for accepted in [0, u32::MAX] {
        let mut driver = Driver::of(echo());
        driver.core.set_status(3);
        let offered = driver.core.registers().device_features();
        driver
            .core
            .registers()
            .set_driver_features(offered & accepted);
        driver.core.set_status(NEGOTIATED);
        assert_eq!(driver.status(), NEGOTIATED);
        driver.set_up(0, rings(0));
        driver.become_ready();
        assert_eq!(driver.status(), READY);
        assert_eq!(driver.request(0, &[(BUFFERS, 4, WRITE)]), 4);
    }
}

#[test]
fn a_driver_cannot_set_what_is_the_devices() {
    let mut driver = Driver::of(echo());
    driver.core.set_status(BROKEN | 16 | 32);
    assert_eq!(driver.status(), 0);
    // DRIVER_OK without FEATURES_OK starts nothing.
    driver.core.set_status(7);
    driver.set_up(0, rings(0));
    driver.offer(0, 0);
    assert_eq!(driver.used(0), 0);
}

#[test]
fn a_live_queue_keeps_its_place() {
    let mut driver = Driver::ready(echo());
    driver.core.registers().queue_select = 0;
    driver.core.registers().set_ring(Ring::Device, Half::Low, 0);
    driver.core.registers().set_queue_size(2);
    assert_eq!(driver.core.registers().queue().unwrap().size, SIZE);
    assert_eq!(
        driver.core.registers().queue().unwrap().rings[2],
        rings(0)[2]
    );
    works(&mut driver, 0);
}

#[test]
fn hostile_registers_at_random() {
    let mut state = 0x1234_5678_9abc_def0_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut driver = Driver::ready(echo());
    for _ in 0..20_000 {
        let value = random();
        let [a, b, c, d, e, f, ..] = value.to_le_bytes();
        let (word, half) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        match random() % 12 {
            0 => driver.core.set_status(a),
            1 => driver.become_ready(),
            2 => driver.core.registers().queue_select = half % 3,
            3 => driver.core.registers().set_queue_size(half),
            4 => driver
                .core
                .registers()
                .set_ring(Ring::Driver, Half::Low, word),
            5 => driver
                .core
                .registers()
                .set_ring(Ring::Device, Half::High, word),
            6 => driver.core.registers().enable_queue(),
            7 => driver.core.registers().kick(half % 3),
            8 => driver.core.registers().driver_select = word % 3,
            9 => driver.core.registers().set_driver_features(word),
            10 => driver.core.write_config(value, &[a; 8]),
            _ => driver.core.read_config(value, &mut [0; 8]),
        }
    }
    driver.restart();
    works(&mut driver, 0);
}

//! The thread that serves a pair of queues, receive and transmit.
//!
//! One thread serves both queues. So it is often awake already when the guest or the host answers a
//! packet, and there is only one thread to wake.

use std::io;

use super::Shared;
use super::receive::{Receiver, Room};
use super::tap::TapQueue;
use crate::util::poll::Events;
use crate::virtio::queue::{Broken, Virtq};
use crate::virtio::stop::Stop;

/// Numbers of the events that the thread waits for.
const RECEIVE: u8 = 0;
const TRANSMIT: u8 = 1;
const TAP: u8 = 2;

/// Returns the events for the kicks of `queues`, which are one pair or half of it.
///
/// # Errors
/// Fails if the host has no file descriptors left.
pub(super) fn kicks(queues: &[Virtq]) -> io::Result<Events> {
    let events = Events::new()?;
    for queue in queues {
        let number = if is_receive(queue) { RECEIVE } else { TRANSMIT };
        events.add_signal(number, queue.kick())?;
    }
    Ok(events)
}

fn is_receive(queue: &Virtq) -> bool {
    queue.index() % 2 == 0
}

impl Shared {
    /// Moves packets between `tap` and `queues` until the worker must stop. `queues` is a pair or
    /// half of it, and `events` has their [`kicks`].
    pub(super) fn serve(
        &self,
        tap: &TapQueue,
        room: Room,
        queues: &mut [Virtq],
        events: &Events,
        stop: &Stop,
    ) -> Result<(), Broken> {
        let (mut receiver, mut transmit) = (None, None);
        for queue in queues {
            if is_receive(queue) {
                receiver = Some(Receiver::new(self, tap, room, queue));
            } else {
                transmit = Some(queue);
            }
        }
        if let Some(queue) = &mut transmit {
            self.transmit(tap, room.header, queue, stop)?;
        }
        let mut polls_tap = false;
        while !stop.is_asked() {
            if let Some(receiver) = &receiver {
                let wants_tap = receiver.wants_tap();
                if wants_tap != polls_tap {
                    poll_tap(tap, events, wants_tap)
                        .map_err(|error| receiver.tap_wait_failed(&error))?;
                    polls_tap = wants_tap;
                }
            }
            let ready = events.wait(receiver.as_ref().and_then(Receiver::patience));
            if let Some(queue) = transmit.as_mut().filter(|_| ready.has(TRANSMIT)) {
                self.transmit(tap, room.header, queue, stop)?;
            }
            if let Some(receiver) = &mut receiver {
                receiver.serve(ready.has(RECEIVE), ready.has(TAP), stop)?;
            }
        }
        if let Some(receiver) = &mut receiver {
            receiver.give_back();
        }
        Ok(())
    }
}

/// Adds the tap's packets to the events that end a wait, or removes them.
fn poll_tap(tap: &TapQueue, events: &Events, wanted: bool) -> io::Result<()> {
    if wanted {
        events.add_readable(TAP, tap)
    } else {
        events.remove(tap)
    }
}

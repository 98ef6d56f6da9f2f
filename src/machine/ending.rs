//! Ends the machine on request: by a signal, Ctrl-A X, a command or `--timeout`. Makes sure that
//! the process ends within [`GRACE`] then, whatever guest and host do meanwhile.

use std::process::exit;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::warn;

use super::Outcome;
use super::mainloop::{Event, Post};
use crate::devices::console::terminal;
use crate::util::stderr::print;
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn};

/// The longest time from the request until the process ends. In this time disks finish the requests
/// that they have begun, and consoles write their last output.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Takes requests to end the machine.
#[derive(Clone)]
pub(super) struct Ending(Arc<Shared>);

struct Shared {
    post: Post,
    state: Mutex<State>,
    changed: Condvar,
    grace: Duration,
    /// Called when the time is over.
    give_up: fn(Outcome),
}

#[derive(Default)]
struct State {
    /// The time limit for the requested end, and its outcome.
    asked: Option<(Instant, Outcome)>,
    /// How the machine ended, while its disks and consoles still write.
    settled: Option<Outcome>,
    came: bool,
    watched: bool,
}

impl Ending {
    /// Creates it, without a request. Requests are sent to `post` as events.
    pub(super) fn new(post: Post) -> Self {
        Self::with(post, GRACE, give_up)
    }

    pub(super) fn with(post: Post, grace: Duration, give_up: fn(Outcome)) -> Self {
        Self(Arc::new(Shared {
            post,
            state: Mutex::default(),
            changed: Condvar::new(),
            grace,
            give_up,
        }))
    }

    /// Requests the end now.
    pub(super) fn ask(&self, outcome: Outcome) {
        self.0.post.send(Event::Asked(outcome));
        self.expect(outcome, Instant::now());
    }

    /// Requests a press of the guest's power key.
    pub(super) fn press(&self) {
        self.0.post.send(Event::Pressed);
    }

    /// Starts the time limit for an end that is requested at `at`.
    pub(super) fn expect(&self, outcome: Outcome, at: Instant) {
        let Some(latest) = at.checked_add(self.0.grace) else {
            return;
        };
        let mut state = lock(&self.0.state);
        if state.watched && state.asked.is_some_and(|(known, _)| known <= latest) {
            return;
        }
        state.asked = Some((latest, outcome));
        self.0.changed.notify_all();
        if !state.watched {
            let shared = Arc::clone(&self.0);
            match spawn(Kind::Main, "end", move || shared.watch()) {
                Ok(_) => state.watched = true,
                Err(error) => warn!("Failed to start the thread that ends rvmm in time: {error}"),
            }
        }
    }

    /// Records how the machine ended. Its disks and consoles still write.
    pub(super) fn settle(&self, outcome: Outcome) {
        lock(&self.0.state).settled = Some(outcome);
    }

    /// Marks the end as complete, so that the time limit has no effect any more.
    pub(super) fn came(&self) {
        lock(&self.0.state).came = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn watch(&self) {
        let mut state = lock(&self.state);
        while let (Some((latest, outcome)), false) = (state.asked, state.came) {
            let left = latest.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let outcome = state.settled.unwrap_or(outcome);
                drop(state);
                return (self.give_up)(outcome);
            }
            let wait = self.changed.wait_timeout(state, left);
            (state, _) = wait.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Ends the process without waiting any longer.
fn give_up(outcome: Outcome) {
    terminal::restore();
    let seconds = GRACE.as_secs();
    print(format_args!(
        "rvmm: {outcome}; it did not end within {seconds} s because of the host: data that disks \
         and consoles have not written is lost"
    ));
    exit(outcome.exit_status().into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::Stop;
    use std::sync::OnceLock;
    use std::sync::mpsc::{Receiver, Sender, channel};

    static GIVEN_UP: OnceLock<Sender<Outcome>> = OnceLock::new();

    fn ending(grace: Duration) -> (Ending, Receiver<Event>) {
        let (post, events) = Post::new().unwrap();
        let give_up = |outcome| GIVEN_UP.get().unwrap().send(outcome).unwrap();
        (Ending::with(post, grace, give_up), events)
    }

    /// The earliest time limit counts. An end that is complete has none.
    #[test]
    fn an_end_that_does_not_come_is_given_up_on() {
        const LONG: Duration = Duration::from_secs(1000);
        let (sender, given_up) = channel();
        GIVEN_UP.set(sender).unwrap();
        let (late, events) = ending(Duration::from_millis(1));
        late.expect(Outcome::TimedOut, Instant::now() + LONG);
        late.ask(Outcome::Left);
        late.ask(Outcome::Signal(15));
        assert_eq!(given_up.recv().unwrap(), Outcome::Left);
        assert!(matches!(events.try_recv(), Ok(Event::Asked(Outcome::Left))));

        // The guest has ended before the request, and only its last output is delayed.
        let (settled, _events) = ending(Duration::from_millis(1));
        settled.settle(Outcome::Guest(Stop::Exit(42)));
        settled.ask(Outcome::Signal(15));
        let end = Outcome::Guest(Stop::Exit(42));
        assert_eq!(given_up.recv().unwrap(), end);

        let (timely, _events) = ending(LONG);
        timely.ask(Outcome::Left);
        timely.came();
        // The thread ends, and drops its reference.
        let shared = Arc::downgrade(&timely.0);
        drop(timely);
        while shared.upgrade().is_some() {
            std::thread::yield_now();
        }
        assert!(given_up.try_recv().is_err());
    }
}

//! The end that somebody asked for: by a signal, Ctrl-A X or `--timeout`. It comes within
//! [`GRACE`], whatever guest and host do meanwhile.

use std::process::exit;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::warn;

use super::Outcome;
use super::mainloop::{Event, Post};
use crate::devices::console::terminal;
use crate::util::stderr::tell;
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn};

/// How long a machine may take to end: its disks for what they have begun, its console for the last
/// bytes.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Where an end is asked for.
#[derive(Clone)]
pub(super) struct Ending(Arc<Shared>);

struct Shared {
    post: Post,
    state: Mutex<State>,
    changed: Condvar,
    grace: Duration,
    /// What is done when the time is over.
    give_up: fn(Outcome),
}

#[derive(Default)]
struct State {
    /// The first end that was asked for, and when it must have come.
    asked: Option<(Instant, Outcome)>,
    /// How the machine ended, while its disks and consoles are still written.
    settled: Option<Outcome>,
    came: bool,
    watched: bool,
}

impl Ending {
    /// Nobody has asked for the end. `post` is told when somebody does.
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

    /// Asks for the end now.
    pub(super) fn ask(&self, outcome: Outcome) {
        self.0.post.send(Event::Asked(outcome));
        self.expect(outcome, Instant::now());
    }

    /// Asks for the guest's power key to be pressed.
    pub(super) fn press(&self) {
        self.0.post.send(Event::Pressed);
    }

    /// From now on makes sure of an end that is asked for at `at`.
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
                Err(error) => warn!("Failed to watch that rvmm ends in time: {error}"),
            }
        }
    }

    /// The machine has ended so, and puts away what it has.
    pub(super) fn settle(&self, outcome: Outcome) {
        lock(&self.0.state).settled = Some(outcome);
    }

    /// The machine has ended, and all is put away.
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

/// Ends the process without what still holds it up.
fn give_up(outcome: Outcome) {
    terminal::restore();
    let seconds = GRACE.as_secs();
    tell(format_args!(
        "rvmm: {outcome}; the host held it up for {seconds} s: what disks and consoles had not \
         written is lost"
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

    /// The earliest end counts; one that came is left alone.
    #[test]
    fn an_end_that_does_not_come_is_given_up_on() {
        const LONG: Duration = Duration::from_secs(1000);
        let (tell, given_up) = channel();
        GIVEN_UP.set(tell).unwrap();
        let (late, events) = ending(Duration::from_millis(1));
        late.expect(Outcome::TimedOut, Instant::now() + LONG);
        late.ask(Outcome::Left);
        late.ask(Outcome::Signal(15));
        assert_eq!(given_up.recv().unwrap(), Outcome::Left);
        assert!(matches!(events.try_recv(), Ok(Event::Asked(Outcome::Left))));

        // The guest's own end came before, and only its last output is held up.
        let (settled, _events) = ending(Duration::from_millis(1));
        settled.settle(Outcome::Guest(Stop::Exit(42)));
        settled.ask(Outcome::Signal(15));
        let end = Outcome::Guest(Stop::Exit(42));
        assert_eq!(given_up.recv().unwrap(), end);

        let (timely, _events) = ending(LONG);
        timely.ask(Outcome::Left);
        timely.came();
        // Its thread has ended, and lets go of what it shared.
        let shared = Arc::downgrade(&timely.0);
        drop(timely);
        while shared.upgrade().is_some() {
            std::thread::yield_now();
        }
        assert!(given_up.try_recv().is_err());
    }
}

//! The server of the control socket. It runs on the main loop.
//!
//! No client can block the loop. All descriptors are non-blocking. A client has `PATIENCE` to send
//! a line and `PATIENCE` to take a reply. At most `CLIENTS_MAX` clients are served at once; others
//! wait in the socket's queue.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, warn};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Next};
use super::{Command, Reply, parse};
use crate::util::socket::Listening;

/// The time that a client has to send a line, and to take a reply.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most clients that are served at once.
const CLIENTS_MAX: usize = 32;

/// The longest time until a server that does not accept clients tries again.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Numbers by which the main loop's events identify their source. The numbers of clients begin at
/// `FIRST_CLIENT`.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;
const FIRST_CLIENT: u32 = 2;

/// The number of a connected client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Client(u32);

/// Called with each command, on the main loop's thread. The client must be passed to
/// [`Server::answer`] with the reply.
pub type OnCommand = Box<dyn Fn(Command, Client)>;

/// The server of the control socket: a subscriber of the main loop.
pub struct Server {
    listening: Listening,
    clients: BTreeMap<Client, Connection>,
    next: Client,
    /// No more clients are accepted for now.
    is_full: bool,
    timer: TimerFd,
    on_command: OnCommand,
    patience: Duration,
}

impl Server {
    /// Listens at `path`. The server works once it is added to the main loop.
    ///
    /// # Errors
    /// Fails if the socket cannot be created. The message names the path.
    pub fn listen(path: &Path, on_command: OnCommand) -> Result<Rc<RefCell<Self>>> {
        Self::listen_for(PATIENCE, path, on_command)
    }

    fn listen_for(
        patience: Duration,
        path: &Path,
        on_command: OnCommand,
    ) -> Result<Rc<RefCell<Self>>> {
        Ok(Rc::new(RefCell::new(Self {
            listening: Listening::at(path, "control socket")?,
            clients: BTreeMap::new(),
            next: Client(FIRST_CLIENT),
            is_full: false,
            timer: TimerFd::new().context("Failed to create a timer for the control socket")?,
            on_command,
            patience,
        })))
    }

    /// Sends `reply` to `client`, if it is still connected.
    pub fn answer(&mut self, client: Client, reply: &Reply, ops: &mut EventOps) {
        let Some(connection) = self.clients.get_mut(&client) else {
            return;
        };
        connection.is_asking = false;
        self.send(client, reply, ops);
        self.serve(client, ops);
        self.set_timer();
    }

    fn send(&mut self, client: Client, reply: &Reply, ops: &mut EventOps) {
        let Some(connection) = self.clients.get_mut(&client) else {
            return;
        };
        let text = serde_json::to_string(reply);
        let text = text.unwrap_or_else(|error| format!(r#"{{"refused":"{error}"}}"#));
        if connection.send(&text).is_err() {
            self.lose(client, ops);
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        while self.clients.len() < CLIENTS_MAX {
            let stream = match self.listening.listener.accept() {
                Ok((stream, _)) => stream,
                // No client is there, or it has disconnected again.
                Err(error) if is_nobody(&error) => return,
                // An error such as no descriptors left. The server tries again when the timer
                // expires.
                Err(error) => {
                    debug!("Failed to accept a client of the control socket: {error}");
                    break;
                }
            };
            let client = self.next;
            self.next = Client(client.0.checked_add(1).unwrap_or(FIRST_CLIENT));
            match Connection::new(stream, self.patience) {
                Ok(connection) => {
                    if let Err(error) = ops.add(events(client, &connection)) {
                        warn!("Failed to listen to a client of the control socket: {error}");
                        return;
                    }
                    self.clients.insert(client, connection);
                }
                Err(error) => debug!("a client of the control socket has gone: {error}"),
            }
        }
        self.is_full = true;
        self.listen_again(ops);
    }

    /// Starts or stops waiting for new clients, by `is_full`.
    fn listen_again(&mut self, ops: &mut EventOps) {
        let wanted = if self.is_full {
            EventSet::empty()
        } else {
            EventSet::IN
        };
        let events = Events::with_data(&self.listening.listener, LISTENER, wanted);
        if let Err(error) = ops.modify(events) {
            warn!("Failed to listen on the control socket: {error}");
        }
    }

    /// Handles the lines that `client` has sent, one after the other, and sends the rest of its
    /// reply.
    fn serve(&mut self, client: Client, ops: &mut EventOps) {
        while let Some(connection) = self.clients.get_mut(&client) {
            if connection.has_unsent() && connection.send_rest().is_err() {
                return self.lose(client, ops);
            }
            if connection.is_closing && !connection.has_unsent() && !connection.is_asking {
                return self.lose(client, ops);
            }
            if !connection.wants_line() {
                break;
            }
            match connection.read() {
                Next::Wait => break,
                Next::Gone => return self.lose(client, ops),
                Next::TooLong => {
                    connection.is_closing = true;
                    let reply = Reply::Refused("the line is too long for a command".into());
                    self.send(client, &reply, ops);
                }
                Next::Line(line) => match parse(&line) {
                    Ok(command) => {
                        connection.is_asking = true;
                        (self.on_command)(command, client);
                    }
                    Err(reason) => {
                        // Close after the first bad line: a flood of them would keep the loop busy.
                        connection.is_closing = true;
                        self.send(client, &Reply::Refused(reason), ops);
                    }
                },
            }
        }
        if let Some(connection) = self.clients.get(&client) {
            if ops.modify(events(client, connection)).is_err() {
                self.lose(client, ops);
            }
        }
    }

    fn lose(&mut self, client: Client, ops: &mut EventOps) {
        if let Some(connection) = self.clients.remove(&client) {
            let _ = ops.remove(Events::empty(&connection.stream));
        }
        if std::mem::take(&mut self.is_full) {
            self.listen_again(ops);
        }
    }

    /// Closes connections whose time limit is over. A client that waits for a reply has no limit.
    fn expire(&mut self, ops: &mut EventOps) {
        let now = Instant::now();
        let late = self
            .clients
            .iter()
            .filter(|(_, c)| !c.is_asking && c.deadline <= now);
        let late: Vec<Client> = late.map(|(client, _)| *client).collect();
        for client in late {
            self.lose(client, ops);
        }
        if self.clients.len() < CLIENTS_MAX && std::mem::take(&mut self.is_full) {
            self.listen_again(ops);
        }
    }

    fn set_timer(&mut self) {
        let waiting = self.clients.values().filter(|c| !c.is_asking);
        let first = waiting.map(|connection| connection.deadline);
        let again = self.is_full.then(|| Instant::now() + LISTEN_AGAIN);
        let first = first.chain(again).min();
        let set = match first {
            Some(at) => {
                // Zero would turn the timer off.
                let left = at.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            debug!("Failed to set the control socket's timer: {error}");
        }
    }
}

/// Whether an error of accept means only that no client is there.
fn is_nobody(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | ConnectionAborted | Interrupted)
}

/// The events to wait for on a client's connection.
fn events(client: Client, connection: &Connection) -> Events {
    let mut wanted = EventSet::empty();
    wanted.set(EventSet::IN, connection.wants_line());
    wanted.set(EventSet::OUT, connection.has_unsent());
    Events::with_data(&connection.stream, client.0, wanted)
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps) {
        let listener = Events::with_data(&self.listening.listener, LISTENER, EventSet::IN);
        let timer = Events::with_data(&self.timer, TIMER, EventSet::IN);
        if let Err(error) = ops.add(listener).and_then(|()| ops.add(timer)) {
            warn!("Failed to listen on the control socket: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
            // Setting the timer again below clears its expiration.
            TIMER => self.expire(ops),
            client => {
                let client = Client(client);
                let has_gone = events
                    .event_set()
                    .intersects(EventSet::HANG_UP | EventSet::ERROR);
                let wants_line = self
                    .clients
                    .get(&client)
                    .is_some_and(Connection::wants_line);
                if has_gone && !wants_line {
                    // The client does not wait for its reply any more.
                    self.lose(client, ops);
                } else {
                    self.serve(client, ops);
                }
            }
        }
        self.set_timer();
    }
}

#[cfg(test)]
mod tests;

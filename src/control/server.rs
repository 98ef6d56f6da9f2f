//! The server's side of the control socket, on the main loop.
//!
//! No client can hold the loop up: all descriptors are non-blocking, a line and a reply have `PATIENCE` each,
//! and at most `CLIENTS_MAX` clients are served at once; others wait in the socket's queue.

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
use super::socket::Listening;
use super::{Command, Reply, parse};

/// The time a client has for its line, and for taking a reply.
const PATIENCE: Duration = Duration::from_secs(5);

/// Clients that are served at once.
const CLIENTS_MAX: usize = 32;

/// When a server that has no room looks again at the latest.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// Numbers of what the server waits for; those of clients are above.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;
const FIRST_CLIENT: u32 = 2;

/// A client, as long as it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Client(u32);

/// Takes each command, with the client that [`Server::answer`] is to be given. It is called on the main loop's
/// thread.
pub type OnCommand = Box<dyn Fn(Command, Client)>;

/// The server. It is a subscriber of the main loop.
pub struct Server {
    listening: Listening,
    clients: BTreeMap<Client, Connection>,
    next: Client,
    /// No more clients are accepted just now.
    is_full: bool,
    timer: TimerFd,
    on_command: OnCommand,
    patience: Duration,
}

impl Server {
    /// A server that listens at `path`, once it is added to a loop.
    ///
    /// # Errors
    /// One line that names the path.
    pub fn listen(path: &Path, on_command: OnCommand) -> Result<Rc<RefCell<Self>>> {
        Self::listen_for(PATIENCE, path, on_command)
    }

    fn listen_for(
        patience: Duration,
        path: &Path,
        on_command: OnCommand,
    ) -> Result<Rc<RefCell<Self>>> {
        Ok(Rc::new(RefCell::new(Self {
            listening: Listening::at(path)?,
            clients: BTreeMap::new(),
            next: Client(FIRST_CLIENT),
            is_full: false,
            timer: TimerFd::new().context("Failed to create a timer for the control socket")?,
            on_command,
            patience,
        })))
    }

    /// Sends `reply` to `client`, if it has not gone.
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
                // Nobody is there, or has gone again.
                Err(error) if is_nobody(&error) => return,
                // Such as no descriptors left: tried again when the timer is over.
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

    /// Accepts clients again, or not, by whether there is room.
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

    /// Serves what `client` has sent, line by line, and sends it what it takes.
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
                    let reply = Reply::Refused("a line that long is no command".into());
                    self.send(client, &reply, ops);
                }
                Next::Line(line) => match parse(&line) {
                    Ok(command) => {
                        connection.is_asking = true;
                        (self.on_command)(command, client);
                    }
                    Err(reason) => {
                        // One line, and no more: a flood of them would keep the loop here.
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

    /// Ends the connections whose time is over. A client that waits for a reply is not one of them.
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
                // Zero would switch it off.
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

/// Whether an error of accept says only that no client is there.
fn is_nobody(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | ConnectionAborted | Interrupted)
}

/// What a client is to be waited for.
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
            // Setting it anew below takes its signal.
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
                    // Nobody waits for the reply any more.
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

//! The saved state of a console: what waits in its queues.

use serde::{Deserialize, Serialize};

use super::{Console, INPUT_CAPACITY, OUTPUT_CAPACITY, Queues, Writer};
use crate::snapshot::{LoadError, State};
use crate::util::Hex;
use crate::util::sync::lock;

/// What a [`Console`] saves.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    /// Input that the guest has not read.
    input: Hex,
    /// Output that nobody has taken.
    output: Hex,
}

impl State for ConsoleState {
    const KIND: &'static str = "console";
    const VERSION: u32 = 1;
}

/// For snapshots.
impl Console {
    /// What waits in the queues. No vCPU may run. Output that the writer has taken is not part of
    /// it: the writer of this process writes it.
    pub fn save(&self) -> ConsoleState {
        let Queues { input, output, .. } = &*lock(&self.queues);
        ConsoleState {
            input: Hex(input.iter().copied().collect()),
            output: Hex(output.iter().copied().collect()),
        }
    }

    /// Takes over what waited in the queues of another process. To be called before the guest runs.
    /// Input that has already arrived here comes behind it; what does not fit is lost. Does not
    /// call the listener: a device looks at the queues when it is resumed.
    ///
    /// # Errors
    /// Fails if it is more than the queues can hold. Nothing has changed then.
    pub fn load(&self, state: ConsoleState) -> Result<(), LoadError> {
        let (Hex(mut input), Hex(output)) = (state.input, state.output);
        for (name, bytes, limit) in [
            ("input", &input, INPUT_CAPACITY),
            ("output", &output, OUTPUT_CAPACITY),
        ] {
            if bytes.len() > limit {
                let waiting = bytes.len();
                return Err(LoadError::Unfit(format!(
                    "{waiting} bytes of {name} wait in the console, and {limit} are the limit"
                )));
            }
        }
        let mut queues = lock(&self.queues);
        input.extend(queues.input.drain(..));
        input.truncate(INPUT_CAPACITY);
        queues.input = input.into();
        queues.output = output.into();
        queues.writer = Writer::Busy;
        drop(queues);
        self.output_ready.notify_one();
        Ok(())
    }
}

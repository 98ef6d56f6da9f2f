//! Options in libFuzzer's form: `-name=value`, then directories of inputs, or files to run once.

use std::path::PathBuf;
use std::time::Duration;

pub(crate) struct Options {
    /// Fuzzing ends after this time.
    pub(crate) max_total_time: Option<Duration>,
    /// Fuzzing ends after so many runs.
    pub(crate) runs: u64,
    pub(crate) seed: u64,
    /// MiB of address space.
    pub(crate) rss_limit_mb: u64,
    /// Seconds for one input.
    pub(crate) timeout: u32,
    /// The most bytes of an input.
    pub(crate) max_len: usize,
    /// The start of the name of a finding's file; it may name a directory.
    pub(crate) artifact_prefix: String,
    /// Directories or files of inputs. Inputs that reach new code are written to the first
    /// directory, if there are two or more.
    pub(crate) corpus: Vec<PathBuf>,
}

impl Options {
    pub(crate) fn read(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            max_total_time: None,
            runs: u64::MAX,
            seed: 1,
            rss_limit_mb: 2048,
            timeout: 30,
            max_len: 4096,
            artifact_prefix: String::new(),
            corpus: Vec::new(),
        };
        for argument in arguments {
            match argument.strip_prefix('-') {
                Some(option) => options.set(option)?,
                None => options.corpus.push(argument.into()),
            }
        }
        Ok(options)
    }

    fn set(&mut self, option: &str) -> Result<(), String> {
        fn number<T: std::str::FromStr>(option: &str, value: &str) -> Result<T, String> {
            let number = value.parse();
            number.map_err(|_| format!("-{option}: {value:?} is no number"))
        }
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        match name {
            "max_total_time" => {
                self.max_total_time = Some(Duration::from_secs(number(name, value)?));
            }
            "runs" => self.runs = number(name, value)?,
            "seed" => self.seed = number(name, value)?,
            "rss_limit_mb" => self.rss_limit_mb = number(name, value)?,
            "timeout" => self.timeout = number(name, value)?,
            "max_len" => self.max_len = number(name, value)?,
            "artifact_prefix" => self.artifact_prefix = value.into(),
            _ => return Err(format!("there is no option -{name}")),
        }
        Ok(())
    }
}

//! The flag `--trace`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};
use crate::util::ByteSize;

/// Where a trace goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceConfig {
    /// The file.
    pub path: PathBuf,
    /// The largest size of the file. Events that do not fit are dropped.
    #[serde(default = "default_limit")]
    pub limit: ByteSize,
}

/// The file has a head and an end, of some hundred bytes.
const LIMIT_MIN: ByteSize = ByteSize::kib(4);

/// A Linux boot to its login makes less than this.
fn default_limit() -> ByteSize {
    ByteSize::mib(256)
}

impl KeyValue for TraceConfig {
    const EXAMPLE: &'static str = "trace.json,limit=1G";
    const MAIN_KEY: Option<&'static str> = Some("path");
}

impl FromStr for TraceConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let trace: Self = keyvalue::parse(text)?;
        match trace.limit < LIMIT_MIN {
            true => Err(format!(
                "limit={} is too small for a trace: give {LIMIT_MIN} or more",
                trace.limit
            )),
            false => Ok(trace),
        }
    }
}

/// The text that the flag accepts.
impl fmt::Display for TraceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&keyvalue::print(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_has_a_file_and_a_limit() {
        let trace: TraceConfig = "a.json".parse().unwrap();
        assert_eq!(
            (trace.path, trace.limit),
            ("a.json".into(), ByteSize::mib(256))
        );
        let trace: TraceConfig = "path=a.json,limit=1M".parse().unwrap();
        assert_eq!(
            (trace.path, trace.limit),
            ("a.json".into(), ByteSize::mib(1))
        );
        let error = "a.json,size=1M".parse::<TraceConfig>().unwrap_err();
        assert!(error.contains("`limit`"), "{error}");
        let error = "a.json,limit=4095".parse::<TraceConfig>().unwrap_err();
        assert!(error.contains("too small"), "{error}");
    }
}

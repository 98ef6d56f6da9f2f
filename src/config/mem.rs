//! Guest RAM.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};
use crate::util::ByteSize;

/// The size and the backing of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemConfig {
    /// The size of RAM.
    pub size: ByteSize,
    /// Take RAM from the host's reserved huge pages of this size (hugetlb). Without it, RAM is
    /// ordinary memory, in transparent huge pages if the host has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<HugePages>,
}

/// The sizes of huge pages (hugetlb) that a RISC-V host can reserve at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    TwoMib,
    /// 1 GiB.
    #[serde(rename = "1G")]
    OneGib,
}

impl HugePages {
    /// The size of one page.
    pub const fn size(self) -> ByteSize {
        match self {
            HugePages::TwoMib => ByteSize::mib(2),
            HugePages::OneGib => ByteSize::mib(1024),
        }
    }
}

impl MemConfig {
    /// RAM of this size, in ordinary memory.
    pub const fn new(size: ByteSize) -> Self {
        Self {
            size,
            hugepages: None,
        }
    }
}

impl KeyValue for MemConfig {
    const EXAMPLE: &'static str = "256M,hugepages=2M";
    const MAIN_KEY: Option<&'static str> = Some("size");
}

impl FromStr for MemConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

/// The text that the flag accepts.
impl fmt::Display for MemConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.size.as_flag())?;
        match self.hugepages {
            Some(pages) => write!(f, ",hugepages={}", pages.size().as_flag()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_and_json_say_the_same() {
        let huge = MemConfig {
            size: ByteSize::mib(256),
            hugepages: Some(HugePages::TwoMib),
        };
        for text in ["256M,hugepages=2M", "size=256M,hugepages=2M"] {
            assert_eq!(text.parse(), Ok(huge));
        }
        assert_eq!("1G".parse(), Ok(MemConfig::new(ByteSize::mib(1024))));
        let json = serde_json::to_string(&huge).unwrap();
        assert_eq!(json, r#"{"size":"256M","hugepages":"2M"}"#);
        assert_eq!(serde_json::from_str::<MemConfig>(&json).unwrap(), huge);
        assert_eq!(huge.to_string(), "256M,hugepages=2M");
    }

    #[test]
    fn only_pages_that_there_are() {
        let error = "256M,hugepages=4M".parse::<MemConfig>().unwrap_err();
        assert!(error.contains("`4M`") && error.contains("`2M`"), "{error}");
        assert!(
            "much"
                .parse::<MemConfig>()
                .unwrap_err()
                .contains("not a size")
        );
    }
}

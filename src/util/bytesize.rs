//! Sizes as people write them: `128M`, `1G`, `4096`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes. The suffixes K, M, G and T are powers of 1024; `M`, `MB` and `MiB` mean the
/// same. In JSON it is a string, in the same form as on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

/// The suffixes and their powers of two, the largest first.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ByteSize {
    /// The size of `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// The size of `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// This size, rounded down to a few digits, in the form that a flag accepts: `8191G` for a page
    /// less than 8 TiB.
    pub fn as_flag_at_most(self) -> String {
        let unit = UNITS.iter().find(|(_, shift)| self.0 >> shift >= 1000);
        match unit {
            Some((suffix, shift)) => format!("{}{suffix}", self.0 >> shift),
            None => self.as_flag(),
        }
    }

    /// The exact size in the form that a flag accepts, with the largest suffix that divides it
    /// (`64M`, `1536K`).
    pub fn as_flag(self) -> String {
        let unit = UNITS
            .iter()
            .find(|(_, shift)| self.0 != 0 && self.0 % (1 << shift) == 0);
        match unit {
            Some((suffix, shift)) => format!("{}{suffix}", self.0 >> shift),
            None => self.0.to_string(),
        }
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.as_flag()
    }
}

impl TryFrom<String> for ByteSize {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

/// The size for messages, rounded down to a tenth: `128 MiB`, `30.4 MiB`, `17 bytes`.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, shift) in UNITS {
            let unit = 1u64 << shift;
            if self.0 >= unit {
                let (whole, tenth) = (self.0 / unit, (self.0 % unit) * 10 / unit);
                return match tenth {
                    0 => write!(f, "{whole} {suffix}iB"),
                    _ => write!(f, "{whole}.{tenth} {suffix}iB"),
                };
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// The reason why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// The text is not a number with an optional suffix.
    #[error("not a size: write a whole number with K, M, G or T, as in 128M")]
    Malformed,
    /// The size is more than 2^64 - 1 bytes.
    #[error("too large: a size has at most 64 bits")]
    TooLarge,
}

impl FromStr for ByteSize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let split = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, suffix) = text.split_at(split);
        if digits.is_empty() {
            return Err(ParseError::Malformed);
        }
        let number: u64 = digits.parse().map_err(|_| ParseError::TooLarge)?;
        let shift = shift_of(suffix).ok_or(ParseError::Malformed)?;
        let bytes = number.checked_mul(1 << shift);
        bytes.map(Self).ok_or(ParseError::TooLarge)
    }
}

/// The binary exponent that a suffix stands for.
fn shift_of(suffix: &str) -> Option<u32> {
    let suffix = suffix.to_ascii_uppercase();
    if matches!(suffix.as_str(), "" | "B") {
        return Some(0);
    }
    let (letter, rest) = suffix.split_at_checked(1)?;
    if !matches!(rest, "" | "B" | "IB") {
        return None;
    }
    let unit = UNITS.iter().find(|(unit, _)| letter.starts_with(*unit));
    unit.map(|(_, shift)| *shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("17B", 17),
            ("1K", 1 << 10),
            ("128M", 128 << 20),
            ("128m", 128 << 20),
            ("128MiB", 128 << 20),
            ("128mb", 128 << 20),
            ("2G", 2 << 30),
            ("99T", 99 << 40),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "M", "-1", "1.5G", "12Q", "1 M", " 1M", "M1", "1KK", "1KiBB", "é", "1é", "1Ké",
        ] {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(ParseError::Malformed),
                "{text}"
            );
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999K"] {
            assert_eq!(
                text.parse::<ByteSize>(),
                Err(ParseError::TooLarge),
                "{text}"
            );
        }
    }

    #[test]
    fn printed_for_people_and_for_flags() {
        for (bytes, people, flag) in [
            (0, "0 bytes", "0"),
            (17, "17 bytes", "17"),
            (1024, "1 KiB", "1K"),
            (31895552, "30.4 MiB", "31148K"),
            (128 << 20, "128 MiB", "128M"),
            (u64::MAX, "16777215.9 TiB", "18446744073709551615"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), people);
            assert_eq!(ByteSize(bytes).as_flag(), flag);
        }
    }

    #[test]
    fn a_limit_has_few_digits() {
        for (bytes, flag) in [
            ((8 << 40) - 4096, "8191G"),
            (4 << 30, "4096M"),
            ((1 << 59) - (1 << 31) - 4096, "524287T"),
            (999, "999"),
        ] {
            assert_eq!(ByteSize(bytes).as_flag_at_most(), flag);
        }
    }
}

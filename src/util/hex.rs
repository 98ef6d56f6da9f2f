//! Bytes as text, in JSON.

use std::fmt;

use serde::Serialize;
use serde::de::{self, Deserialize, Deserializer, Visitor};

/// Bytes. As text, each has two hexadecimal digits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct Hex(pub Vec<u8>);

impl From<Hex> for String {
    fn from(Hex(bytes): Hex) -> Self {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 0xf)]));
        }
        text
    }
}

/// Reads the text where it is, without a copy of it.
impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;

        impl Visitor<'_> for Digits {
            type Value = Hex;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("hexadecimal digits")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Hex, E> {
                Hex::try_from(text).map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Digits)
    }
}

impl TryFrom<&str> for Hex {
    type Error = &'static str;

    fn try_from(text: &str) -> Result<Self, &'static str> {
        let pairs = text.as_bytes().chunks_exact(2);
        let mut wrong = !pairs.remainder().is_empty();
        let byte = |pair: &[u8]| {
            let [high, low] = [pair[0], pair[1]].map(|digit| VALUES[usize::from(digit)]);
            wrong |= high | low > 0xf;
            (high << 4) | low
        };
        let bytes = pairs.map(byte).collect();
        match wrong {
            true => Err("not an even number of hexadecimal digits"),
            false => Ok(Self(bytes)),
        }
    }
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The value of each digit, and 0xff for every other byte. A snapshot has thousands of digits.
const VALUES: [u8; 256] = {
    let mut values = [0xff; 256];
    let mut value = 0;
    while value < 16 {
        let digit = DIGITS[value as usize];
        values[digit as usize] = value;
        values[digit.to_ascii_uppercase() as usize] = value;
        value += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        for (bytes, text) in [
            (&[][..], "\"\""),
            (&[0x00, 0x0d, 0xfe, 0xff], "\"000dfeff\""),
        ] {
            let hex = Hex(bytes.into());
            assert_eq!(serde_json::to_string(&hex).unwrap(), text);
            assert_eq!(serde_json::from_str::<Hex>(text).unwrap(), hex);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["abc", "+f", "é", "0x", " 1"] {
            assert!(Hex::try_from(text).is_err(), "{text}");
            let line = serde_json::from_value::<Hex>(text.into()).unwrap_err();
            assert_eq!(line.to_string(), "not an even number of hexadecimal digits");
        }
    }
}

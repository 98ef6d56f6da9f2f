//! Bytes as text, in JSON.

use serde::{Deserialize, Serialize};

/// Bytes. As text, each has two hexadecimal digits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex(pub Vec<u8>);

impl From<Hex> for String {
    fn from(Hex(bytes): Hex) -> Self {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            let digits = [byte >> 4, byte & 0xf].map(u32::from);
            text.extend(
                digits
                    .into_iter()
                    .filter_map(|digit| char::from_digit(digit, 16)),
            );
        }
        text
    }
}

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.as_bytes().chunks(2);
        let byte = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair)
                .ok()
                .filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()))?;
            u8::from_str_radix(pair, 16).ok()
        };
        let bytes = digits.map(byte).collect::<Option<_>>();
        bytes
            .map(Hex)
            .ok_or_else(|| "not an even number of hexadecimal digits".into())
    }
}

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
            assert!(Hex::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}

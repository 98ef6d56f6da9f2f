//! Reads a struct from a flag's `key=value,…` text and from a JSON object, by one serde derive.
//!
//! [`parse`] makes a JSON object of strings from the flag's text, and serde reads the struct from
//! it. A first word without `=` is the value of the struct's main key.
//!
//! A value in double quotes may contain commas: `"a,b.img"`, or `path="a,b.img"`. Inside quotes, a
//! backslash stands before a quote or a backslash that belongs to the value.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// A struct that [`parse`] can read, with what it needs for that.
pub(super) trait KeyValue: DeserializeOwned {
    /// The key that a first word without `=` gives a value to. `None` if each word needs a key.
    const MAIN_KEY: Option<&'static str> = None;
    /// A complete value of the flag, for error messages.
    const EXAMPLE: &'static str;
    /// Keys that may stand alone, which means `=on`.
    const SWITCHES: &'static [&'static str] = &[];
}

/// Parses a flag's text.
///
/// # Errors
/// A message of one line that names the wrong key or value.
pub(super) fn parse<T: KeyValue>(text: &str) -> Result<T, String> {
    let mut object = Map::new();
    if text.is_empty() {
        return Err(format!("the value is empty; write it as in {}", T::EXAMPLE));
    }
    for (index, word) in words(text)?.into_iter().enumerate() {
        let (key, value) = match word {
            Word::Pair(key, value) => (key, value),
            Word::Lone(word) if T::SWITCHES.contains(&word.as_str()) => (word, "on".into()),
            Word::Lone(word) | Word::Quoted(word) => match T::MAIN_KEY.filter(|_| index == 0) {
                Some(key) => (key.into(), word),
                None => return Err(lonely::<T>(&word)),
            },
        };
        if object.contains_key(&key) {
            return Err(format!("{key} is given twice"));
        }
        object.insert(key, value.into());
    }
    from_object(object)
}

/// What stands between two commas.
enum Word {
    /// A key and its value.
    Pair(String, String),
    /// Text without `=`.
    Lone(String),
    /// A value in quotes, without a key.
    Quoted(String),
}

const QUOTE: char = '"';
const ESCAPE: char = '\\';

/// The words of a flag's text.
fn words(text: &str) -> Result<Vec<Word>, String> {
    let mut words = Vec::new();
    let mut rest = Some(text);
    while let Some(text) = rest {
        let end = text.find([',', '=', QUOTE]).unwrap_or(text.len());
        let (before, at) = text.split_at(end);
        let word;
        (word, rest) = if let Some(value) = at.strip_prefix('=') {
            let (value, rest) = value_of(value)?;
            (Word::Pair(before.into(), value), rest)
        } else if at.starts_with(QUOTE) && before.is_empty() {
            let (value, rest) = value_of(at)?;
            (Word::Quoted(value), rest)
        } else {
            let (word, rest) = value_of(text)?;
            (Word::Lone(word), rest)
        };
        words.push(word);
    }
    Ok(words)
}

/// The value that `text` begins with, and what follows the comma behind it, if there is one.
fn value_of(text: &str) -> Result<(String, Option<&str>), String> {
    let Some(quoted) = text.strip_prefix(QUOTE) else {
        return Ok(match text.split_once(',') {
            Some((value, rest)) => (value.into(), Some(rest)),
            None => (text.into(), None),
        });
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            ESCAPE => match chars.next() {
                Some((_, char @ (QUOTE | ESCAPE))) => value.push(char),
                _ => {
                    return Err(
                        "in quotes, a backslash needs a quote or a backslash behind it".into(),
                    );
                }
            },
            QUOTE => {
                let rest = &quoted[at + 1..];
                return match rest.strip_prefix(',') {
                    Some(rest) => Ok((value, Some(rest))),
                    None if rest.is_empty() => Ok((value, None)),
                    None => Err(format!(
                        "{rest:?} is behind a closing quote: write a comma first"
                    )),
                };
            }
            char => value.push(char),
        }
    }
    Err("a quote is not closed".into())
}

/// `value` as a flag's text has it: in quotes if it has a comma, or begins with a quote.
fn quoted(value: &str) -> String {
    if !value.contains(',') && !value.starts_with(QUOTE) {
        return value.to_owned();
    }
    let mut text = String::from(QUOTE);
    for char in value.chars() {
        if matches!(char, QUOTE | ESCAPE) {
            text.push(ESCAPE);
        }
        text.push(char);
    }
    text.push(QUOTE);
    text
}

/// The error message for a word without `=`.
fn lonely<T: KeyValue>(word: &str) -> String {
    if word.is_empty() {
        return "a comma is first, last, or next to another: remove it".into();
    }
    // Find out whether the word is a key at all.
    let object = Map::from_iter([(word.to_owned(), Value::from("x"))]);
    match from_object::<T>(object) {
        Err(error) if error.starts_with(UNKNOWN) => error,
        _ => format!("{word:?} has no value: write {word}=VALUE"),
    }
}

/// How the error message for an unknown key begins.
const UNKNOWN: &str = "unknown key";

fn from_object<T: KeyValue>(object: Map<String, Value>) -> Result<T, String> {
    let read = serde_json::from_value(Value::Object(object));
    read.map_err(|error| {
        let error = error.to_string().replacen("unknown field", UNKNOWN, 1);
        let error = error.replacen("missing field", "missing key", 1);
        format!("{error}; write it as in {}", T::EXAMPLE)
    })
}

/// The flag's text for `value`. In JSON, all its fields have to be strings, numbers or booleans.
pub(super) fn print<T: Serialize>(value: &T) -> String {
    let Ok(Value::Object(object)) = serde_json::to_value(value) else {
        return String::new();
    };
    let words = object.iter().map(|(key, value)| match value {
        Value::String(text) => format!("{key}={}", quoted(text)),
        Value::Bool(true) => format!("{key}=on"),
        Value::Bool(false) => format!("{key}=off"),
        other => format!("{key}={other}"),
    });
    words.collect::<Vec<_>>().join(",")
}

/// Reads a [`KeyValue`] from JSON: from an object, or from a string with the flag's text. For
/// `deserialize_with`.
pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: KeyValue,
    D: Deserializer<'de>,
{
    deserializer.deserialize_any(Either(PhantomData))
}

/// As [`deserialize`], for an optional field.
pub(super) fn deserialize_some<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: KeyValue,
    D: Deserializer<'de>,
{
    deserialize(deserializer).map(Some)
}

/// As [`deserialize`], for a list.
pub(super) fn deserialize_list<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: KeyValue,
    D: Deserializer<'de>,
{
    struct One<T>(T);
    impl<'de, T: KeyValue> Deserialize<'de> for One<T> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserialize(deserializer).map(One)
        }
    }
    let list = Vec::<One<T>>::deserialize(deserializer)?;
    Ok(list.into_iter().map(|One(item)| item).collect())
}

/// Whether a switch is off. For `skip_serializing_if`.
pub(super) fn is_off(switch: &bool) -> bool {
    !switch
}

/// Reads a switch: `on` or `off`, in JSON also true or false. For `deserialize_with`.
pub(super) fn switch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "write on or off")]
    enum Switch {
        Bool(bool),
        Word(Word),
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Word {
        On,
        Off,
    }
    Ok(match Switch::deserialize(deserializer)? {
        Switch::Bool(on) => on,
        Switch::Word(word) => matches!(word, Word::On),
    })
}

struct Either<T>(PhantomData<T>);

impl<'de, T: KeyValue> Visitor<'de> for Either<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object, or the text of the flag")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        parse(text).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map_err(A::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Thing {
        path: String,
        #[serde(default)]
        id: Option<String>,
    }

    impl KeyValue for Thing {
        const EXAMPLE: &'static str = "a,id=b";
        const MAIN_KEY: Option<&'static str> = Some("path");
    }

    #[test]
    fn the_main_key_may_go_unsaid() {
        let thing = |id: Option<&str>| Thing {
            path: "a".into(),
            id: id.map(Into::into),
        };
        assert_eq!(parse("a"), Ok(thing(None)));
        assert_eq!(parse("a,id=b=c"), Ok(thing(Some("b=c"))));
        assert_eq!(parse("id=b,path=a"), Ok(thing(Some("b"))));
    }

    /// What a shell passes on of --disk 'path="a,b.img"'.
    #[test]
    fn a_value_in_quotes_may_have_commas() {
        let path = |text: &str| parse::<Thing>(text).map(|thing| thing.path);
        for (text, value) in [
            (r#"path="a,b.img""#, "a,b.img"),
            (r#""a,b.img",id=c"#, "a,b.img"),
            (r#"id=c,path="say \"hi\", \\""#, r#"say "hi", \"#),
            (r#"a"b"#, r#"a"b"#),
            (r#"path=a"b"#, r#"a"b"#),
            (r#""""#, ""),
        ] {
            assert_eq!(path(text).as_deref(), Ok(value), "{text}");
        }
        for (text, part) in [
            (r#"path="a,b"#, "not closed"),
            (r#"path="a"b"#, "closing quote"),
            (r#"path="a\b""#, "backslash"),
            (r#"a,"b""#, "unknown key `b`"),
        ] {
            let error = path(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for value in ["a", "a,b", "\"", "a\"b", "\\", ",\\\"", "", "=", "a=b,c"] {
            let text = print(&serde_json::json!({ "path": value, "id": "c" }));
            assert_eq!(path(&text).as_deref(), Ok(value), "{text}");
        }
    }

    #[test]
    fn errors_name_the_key() {
        for (text, part) in [
            ("a,b", "unknown key `b`, expected `path` or `id`"),
            ("a,id", "id=VALUE"),
            ("a,", "comma"),
            ("a,path=b", "path is given twice"),
            ("a,size=1", "`size`"),
            ("id=b", "`path`"),
        ] {
            let error = parse::<Thing>(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

//! Text from users and guests in rvmm's one-line messages.

/// Whether a terminal may show other text than is there because of `letter`: control characters,
/// separators of lines, and those that change the direction of text (UAX #9).
fn misleads(letter: char) -> bool {
    letter.is_control()
        || matches!(letter,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Escapes the control characters in `message`, for example those in a file name. So the message
/// stays on one line, cannot move a terminal's cursor, and reads as it is.
pub fn on_one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for letter in message.chars() {
        if misleads(letter) {
            line.extend(letter.escape_default());
        } else {
            line.push(letter);
        }
    }
    line
}

/// Escapes these characters in JSON text, where only strings have them. Its own newlines stay.
pub fn in_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for letter in json.chars() {
        match misleads(letter) && letter != '\n' {
            // All of them have four digits at most.
            true => text.push_str(&format!("\\u{:04x}", u32::from(letter))),
            false => text.push(letter),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(on_one_line("a\n\"b\u{1b}é"), "a\\n\"b\\u{1b}é");
    }

    #[test]
    fn text_has_its_own_direction() {
        let text = "a\u{202e}\u{9b}b\u{2066}\u{61c}\u{7f}é\u{200f}";
        let line = r"a\u{202e}\u{9b}b\u{2066}\u{61c}\u{7f}é\u{200f}";
        assert_eq!(on_one_line(text), line);
        let value = serde_json::json!({ "key": text, "more": "\n\u{1}" });
        let json = in_json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(
            json.contains(r"a\u202e\u009bb\u2066\u061c\u007fé\u200f"),
            "{json}"
        );
        assert_eq!(json.lines().count(), 4);
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read, value);
    }
}

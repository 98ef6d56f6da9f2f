//! Text from users and guests in rvmm's one-line messages.

/// Escapes the control characters in `message`, for example those in a file name. So the message
/// stays on one line and cannot move a terminal's cursor.
pub fn on_one_line(message: &str) -> String {
    let mut line = String::with_capacity(message.len());
    for letter in message.chars() {
        if letter.is_control() {
            line.extend(letter.escape_default());
        } else {
            line.push(letter);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(on_one_line("a\n\"b\u{1b}é"), "a\\n\"b\\u{1b}é");
    }
}

//! Text of others on a line of rvmm's.

/// `message` with the control characters of names in it escaped: it stays one line, and moves no cursor.
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

//! Lines on the control socket: each is a command, or is refused with one line. Also a machine's
//! replies.
//!
//! The client reads a reply; printing and reading it gives the same again.

use rvmm::control::{self, Reply};
use rvmm::util::Hex;
use serde_json::Value;

fuzz_engine::fuzz_target!(|data: &[u8]| {
    match control::parse(data) {
        Ok(command) => {
            let line = serde_json::json!({ "command": command }).to_string();
            assert_eq!(control::parse(line.as_bytes()), Ok(command));
        }
        Err(reason) => assert!(!reason.contains('\n'), "{reason:?} has more lines than one"),
    }
    if let Ok(reply) = serde_json::from_slice::<Reply>(data) {
        let line = serde_json::to_string(&reply).expect("a reply from JSON is JSON");
        assert!(!line.contains('\n'), "{line:?} has more lines than one");
        let again: Reply = serde_json::from_str(&line).expect("what is printed is read");
        assert!(again == reply || has_fraction(&reply), "{line}");
        if let Reply::Status(status) = &reply {
            assert!(status.to_string().ends_with('\n'));
        }
    }
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(hex) = Hex::try_from(text) {
            assert_eq!(String::from(hex), text.to_ascii_lowercase());
        }
    }
});

/// No reply of rvmm contains a fraction, and serde_json does not guarantee its last digit.
fn has_fraction(reply: &Reply) -> bool {
    fn is_in(value: &Value) -> bool {
        match value {
            Value::Number(number) => number.is_f64(),
            Value::Array(values) => values.iter().any(is_in),
            Value::Object(values) => values.values().any(is_in),
            _ => false,
        }
    }
    match reply {
        Reply::Stats(value) => is_in(value),
        Reply::Status(status) => status.devices.values().any(is_in),
        _ => false,
    }
}

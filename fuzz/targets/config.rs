//! A machine's JSON: accepted input is printed, and reading that gives the same again.
//!
//! If `validate` accepts it, flags can say the same.

use rvmm::config::VmConfig;

fuzz_engine::fuzz_target!(|data: &[u8]| {
    let Ok(config) = serde_json::from_slice::<VmConfig>(data) else {
        return;
    };
    let printed = serde_json::to_string_pretty(&config).expect("a configuration from JSON is JSON");
    let again: VmConfig = serde_json::from_str(&printed).expect("what is printed is read");
    assert_eq!(again, config);
    match config.validate() {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(()) => {
            assert_eq!(config.mem.to_string().parse(), Ok(config.mem));
            assert_eq!(config.on_sigterm.to_string().parse(), Ok(config.on_sigterm));
            assert!(config.kernel().is_ok());
        }
    }
});

//! `--config` and `--print-config`: read and write a machine as JSON.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::config::VmConfig;
use crate::machine::status;

/// Why a configuration file cannot be used.
#[derive(Debug, Error)]
pub(super) enum FileError {
    #[error("Failed to read configuration {0:?}: {1}")]
    Read(PathBuf, io::Error),
    #[error("Failed to read configuration {0:?}: {1}")]
    Json(PathBuf, String),
}

impl FileError {
    /// The exit status for this error.
    pub(super) fn status(&self) -> u8 {
        match self {
            FileError::Read(..) => status::HOST_FAILED,
            FileError::Json(..) => status::USAGE,
        }
    }
}

/// Reads the machine from the file at `path`. Flags that were given on the command line override
/// the file.
pub(super) fn merge(
    path: &Path,
    flags: &VmConfig,
    matches: &ArgMatches,
) -> Result<VmConfig, FileError> {
    let text = read_text(path)?;
    let given = |key: &str| matches.value_source(key) == Some(ValueSource::CommandLine);
    overlay(&text, flags, given).map_err(|e| FileError::Json(path.to_owned(), e))
}

/// Reads the text of the file or pipe at `path`.
fn read_text(path: &Path) -> Result<String, FileError> {
    /// Size limit in bytes. No configuration is as large.
    const MOST: u64 = 1 << 20;
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MOST + 1).read_to_end(&mut bytes));
    read.map_err(|error| FileError::Read(path.to_owned(), error))?;
    if bytes.len() as u64 > MOST {
        let why = "larger than 1 MiB, so not a configuration".into();
        return Err(FileError::Json(path.to_owned(), why));
    }
    let text = String::from_utf8(bytes);
    text.map_err(|_| FileError::Json(path.to_owned(), "not UTF-8 text".into()))
}

/// Rewrites serde's error message in plainer words.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.replace("expected u32", "expected a whole number");
    text.replace("expected a sequence", "expected a list in [ ]")
}

/// Parses all of `text`. An error names the key and the line.
fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let read = serde_path_to_error::deserialize(&mut deserializer);
    let read = read.map_err(|error| {
        let (path, why) = (error.path().to_string(), plain(error.inner()));
        // "." is the whole document, "?" an unknown place. Leave both out.
        match path.as_str() {
            "." | "?" => why,
            _ => format!("{path}: {why}"),
        }
    })?;
    deserializer.end().map_err(|error| plain(&error))?;
    Ok(read)
}

fn overlay(text: &str, flags: &VmConfig, given: impl Fn(&str) -> bool) -> Result<VmConfig, String> {
    // Check that it is an object: serde would accept an array of the values, too.
    let _: Map<String, Value> = read(text)?;
    let file: VmConfig = read(text)?;
    let merge = || {
        let mut merged = object(&file)?;
        // A given flag overrides the file even if its value is the default. The JSON of `flags`
        // leaves out default values, so remove the file's values first.
        merged.retain(|key, _| !given(key));
        merged.extend(object(flags)?.into_iter().filter(|(key, _)| given(key)));
        serde_json::from_value(Value::Object(merged))
    };
    merge().map_err(|error: serde_json::Error| error.to_string())
}

fn object(config: &VmConfig) -> serde_json::Result<Map<String, Value>> {
    match serde_json::to_value(config)? {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

/// Formats `config` as JSON, in the form that [`merge`] reads.
///
/// # Errors
/// Fails if a path is not UTF-8, which JSON cannot represent.
pub(super) fn print(config: &VmConfig) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(config)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        ConsoleConfig, HugePages, IrqchipKind, KernelFormat, MemConfig, Transport,
    };
    use crate::util::ByteSize;

    fn flags() -> VmConfig {
        VmConfig {
            kernel: Some("flag".into()),
            mem: MemConfig::new(ByteSize::mib(64)),
            ..VmConfig::default()
        }
    }

    #[test]
    fn what_is_printed_is_read() {
        let config = VmConfig {
            kernel: Some("Image".into()),
            kernel_format: KernelFormat::Flat,
            initrd: Some("initrd".into()),
            cmdline: "a \"b\"".into(),
            mem: MemConfig {
                size: ByteSize::kib(5000),
                hugepages: Some(HugePages::TwoMib),
            },
            cpus: 1,
            cpu: Some("v=off,mimpid=3".parse().unwrap()),
            sbi: Some("pmu=off".parse().unwrap()),
            disk: vec!["x.img,readonly".parse().unwrap(), "y,id=b".parse().unwrap()],
            net: vec!["tap=t,vhost".parse().unwrap()],
            rng: true,
            virtio_console: Some(ConsoleConfig::Pty),
            transport: Transport::Mmio,
            irqchip: IrqchipKind::AiaEmul,
            console: ConsoleConfig::File("log".into()),
            on_sigterm: "poweroff,timeout=5m".parse().unwrap(),
            on_crash: "pause,watch=off".parse().unwrap(),
            symbols: Some("System.map".into()),
        };
        assert_eq!(
            overlay(&print(&config).unwrap(), &flags(), |_| false).unwrap(),
            config
        );
        let default = VmConfig::default();
        assert_eq!(overlay("{}", &flags(), |_| false).unwrap(), default);
    }

    #[test]
    fn flags_go_before_the_file() {
        let file = r#"{ "kernel": "file", "mem": "1G", "irqchip": "plic" }"#;
        let merged = overlay(file, &flags(), |flag| flag == "mem").unwrap();
        assert_eq!(merged.kernel, Some("file".into()));
        assert_eq!(merged.mem, MemConfig::new(ByteSize::mib(64)));
        assert_eq!(merged.irqchip, IrqchipKind::Plic);
    }

    /// All flags are given, each with its default value.
    #[test]
    fn defaults_go_before_the_file_too() {
        let file = VmConfig {
            kernel: Some("Image".into()),
            kernel_format: KernelFormat::Flat,
            initrd: Some("initrd".into()),
            cmdline: "quiet".into(),
            cpus: 3,
            transport: Transport::Mmio,
            irqchip: IrqchipKind::Plic,
            console: ConsoleConfig::Pty,
            on_sigterm: "poweroff,timeout=5m".parse().unwrap(),
            on_crash: "reset".parse().unwrap(),
            ..VmConfig::default()
        };
        let file = print(&file).unwrap();
        let default = VmConfig::default();
        assert_eq!(overlay(&file, &default, |_| true).unwrap(), default);
    }

    #[test]
    fn unknown_keys_and_values_are_named() {
        for (file, parts) in [
            (
                r#"{ "memory": "1G" }"#,
                &["`memory`", "`mem`", "`kernel`", "line 1"][..],
            ),
            (r#"{ "irqchip": "apic" }"#, &["`apic`", "`plic`"]),
            (r#"{ "mem": "much" }"#, &["not a size"]),
            (r#"{ "console": "tty" }"#, &["socket=PATH"]),
            (r#"{ "mem": "1G" "#, &["line 1"]),
            (r#"{ "mem": "1G" } x"#, &["line 1"]),
            (
                r#"{ "cpus": "two" }"#,
                &["cpus: ", "whole number", "line 1"],
            ),
            (r#"{ "disk": "a" }"#, &["disk: ", "a list in [ ]"]),
            (r#"{ "disk": ["a", 3] }"#, &["disk[1]: "]),
            (r#"{ "rng": 1 }"#, &["rng: "]),
            ("[]", &["invalid"]),
        ] {
            let line = overlay(file, &flags(), |_| false).unwrap_err();
            assert!(parts.iter().all(|part| line.contains(part)), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}

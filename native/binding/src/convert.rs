//! Values and errors in both directions.
use atoll_engine::{EngineError, Result};
use atoll_io::LayerId;
use atoll_map::{RootRef, Run};
use napi::bindgen_prelude::{BigInt, Float64Array};
use napi_derive::napi;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Numbers are exact up to here in JavaScript.
pub const SAFE_INTEGER_MAX: u64 = (1 << 53) - 1;

/// A root as JavaScript has it.
#[napi(object)]
pub struct JsRootRef {
    pub word: BigInt,
    pub crc: u32,
}

/// Runs a synchronous entry: its error becomes a JavaScript one, a panic too.
pub fn guard<T>(body: impl FnOnce() -> Result<T>) -> napi::Result<T> {
    caught(body).map_err(js_error)
}

/// Runs `body`; a panic in it becomes `ENGINE_PANIC`.
pub fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("a panic without a message");
        Err(EngineError::new("ENGINE_PANIC", libc::EIO, format!("the engine failed: {text}")))
    })
}

/// An error as data: JSON in the message, which native-error.ts takes apart.
pub fn js_error(error: EngineError) -> napi::Error {
    let mut json = String::from("{\"code\":");
    push_json_string(&mut json, error.code);
    json.push_str(",\"message\":");
    push_json_string(&mut json, &error.message);
    json.push_str(",\"values\":{");
    for (index, (name, value)) in error.values.iter().enumerate() {
        if index > 0 {
            json.push(',');
        }
        push_json_string(&mut json, name);
        json.push(':');
        // Integers that JavaScript can hold cross as numbers, everything else as text.
        match value.parse::<i64>() {
            Ok(number) if number.unsigned_abs() <= SAFE_INTEGER_MAX && number.to_string() == *value => json.push_str(value),
            _ => push_json_string(&mut json, value),
        }
    }
    json.push_str("}}");
    napi::Error::from_reason(json)
}

fn push_json_string(json: &mut String, text: &str) {
    json.push('"');
    for character in text.chars() {
        match character {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            control if control < ' ' => {
                // Writing to a String cannot fail.
                let _ = write!(json, "\\u{:04x}", control as u32);
            }
            other => json.push(other),
        }
    }
    json.push('"');
}

/// An argument that is not what it must be.
pub fn invalid(name: &'static str, value: impl std::fmt::Display, wanted: &str) -> EngineError {
    EngineError::new("ARGUMENT_INVALID", libc::EINVAL, format!("{name} is {value}, but must be {wanted}"))
        .with("argument", name)
        .with("value", value)
}

/// A non-negative integer.
pub fn to_u64(name: &'static str, value: f64) -> Result<u64> {
    if value.fract() == 0.0 && (0.0..=SAFE_INTEGER_MAX as f64).contains(&value) {
        return Ok(value as u64);
    }
    Err(invalid(name, value, "an integer from 0 to 2^53 - 1"))
}

/// A non-negative integer that fits 32 bits.
pub fn to_u32(name: &'static str, value: f64) -> Result<u32> {
    u32::try_from(to_u64(name, value)?).map_err(|_| invalid(name, value, "below 2^32"))
}

/// A count or a limit of a list.
pub fn to_usize(name: &'static str, value: f64) -> Result<usize> {
    usize::try_from(to_u64(name, value)?).map_err(|_| invalid(name, value, "a length"))
}

/// The 16 bytes of a UUID in its lower-case form.
pub fn to_uuid(name: &'static str, text: &str) -> Result<[u8; 16]> {
    LayerId::parse(text).map(|id| id.0).ok_or_else(|| invalid(name, text, "a UUID in lower case"))
}

/// A layer's id.
pub fn to_layer_id(text: &str) -> Result<LayerId> {
    to_uuid("layer id", text).map(LayerId)
}

/// Slots that a size in bytes touches.
pub fn to_slot_limit(size_bytes: f64) -> Result<u64> {
    Ok(to_u64("sizeBytes", size_bytes)?.div_ceil(atoll_map::SLOT_BYTES))
}

pub fn to_root(root: &JsRootRef) -> Result<RootRef> {
    let (negative, word, lossless) = root.word.get_u64();
    if negative || !lossless {
        return Err(invalid("root word", "out of range", "from 0 to 2^64 - 1"));
    }
    Ok(RootRef { word, crc: root.crc })
}

pub fn from_root(root: RootRef) -> JsRootRef {
    JsRootRef { word: BigInt::from(root.word), crc: root.crc }
}

/// Ids, checked one by one.
pub fn to_ids(name: &'static str, ids: &[f64]) -> Result<Vec<u64>> {
    ids.iter().map(|id| to_u64(name, *id)).collect()
}

pub fn from_ids(ids: impl IntoIterator<Item = u64>) -> Float64Array {
    Float64Array::new(ids.into_iter().map(|id| id as f64).collect())
}

/// Runs as triples.
pub fn from_runs(runs: &[Run]) -> Float64Array {
    let mut flat = Vec::with_capacity(runs.len() * 3);
    for run in runs {
        flat.extend([run.start_slot as f64, run.slot_count as f64, f64::from(run.owner)]);
    }
    Float64Array::new(flat)
}

/// Triples as runs; ascending and not overlapping, or an error.
pub fn to_runs(flat: &[f64]) -> Result<Vec<Run>> {
    let (triples, rest) = flat.as_chunks::<3>();
    if !rest.is_empty() {
        return Err(invalid("runs", flat.len(), "triples of start slot, slot count, owner"));
    }
    let mut runs: Vec<Run> = Vec::with_capacity(triples.len());
    for triple in triples {
        let run = Run {
            start_slot: to_u64("start slot", triple[0])?,
            slot_count: to_u64("slot count", triple[1])?,
            owner: to_u32("owner", triple[2])?,
        };
        let is_ascending = runs.last().is_none_or(|last| last.start_slot + last.slot_count <= run.start_slot);
        if !is_ascending || run.slot_count == 0 || run.start_slot + run.slot_count > atoll_map::MAP_SLOTS {
            return Err(invalid("run", format!("{}+{}", run.start_slot, run.slot_count), "ascending, not empty and within the map"));
        }
        runs.push(run);
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_crosses_as_json_with_numbers_as_numbers() {
        let error = EngineError::new("IO_ERROR", libc::EIO, "a \"quoted\"\npath \\ é")
            .with("offsetBytes", 4096)
            .with("tooLarge", u64::MAX)
            .with("padded", "007")
            .with("path", "/tmp/x");
        let json = js_error(error).reason.clone();
        assert_eq!(
            json,
            "{\"code\":\"IO_ERROR\",\"message\":\"a \\\"quoted\\\"\\u000apath \\\\ é\",\"values\":{\"offsetBytes\":4096,\
             \"tooLarge\":\"18446744073709551615\",\"padded\":\"007\",\"path\":\"/tmp/x\"}}"
        );
    }

    #[test]
    fn numbers_are_integers_in_the_safe_range_or_refused() {
        assert_eq!(to_u64("n", 0.0).unwrap(), 0);
        assert_eq!(to_u64("n", SAFE_INTEGER_MAX as f64).unwrap(), SAFE_INTEGER_MAX);
        for wrong in [-1.0, 0.5, f64::NAN, f64::INFINITY, 9_007_199_254_740_992.0] {
            assert_eq!(to_u64("n", wrong).unwrap_err().code, "ARGUMENT_INVALID");
        }
        assert!(to_u32("n", 4_294_967_296.0).is_err());
    }

    #[test]
    fn runs_must_ascend_and_lie_within_the_map() {
        assert_eq!(to_runs(&[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]).unwrap().len(), 2);
        for wrong in [&[0.0, 2.0][..], &[0.0, 0.0, 1.0], &[5.0, 1.0, 1.0, 5.0, 1.0, 1.0], &[0.0, 9e15, 1.0]] {
            assert!(to_runs(wrong).is_err());
        }
    }

    #[test]
    fn a_panic_becomes_an_error_with_its_text() {
        let error = caught::<()>(|| std::panic::resume_unwind(Box::new("on purpose"))).unwrap_err();
        assert_eq!(error.code, "ENGINE_PANIC");
        assert!(error.message.contains("on purpose"));
    }
}

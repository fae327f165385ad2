//! Who writes the journal of a layer: an epoch and a text, as attributes of the object that stands for the layer. The lock of the pool
//! says which daemon may write at all; this says which of its leases, and holds between daemons that are both let into the pool.
//!
//! Rules
//! - The epoch only rises. Who claims a journal raises it, then looks which segments there are, then claims each of them.
//! - Who makes a segment puts it into the index, makes it, and then makes sure that his epoch is still the newest, before anything is
//!   written to it. So one that was made before a claim is seen by who claims, and one that is made after it is never written.
//! - What is written to a segment carries the mark of the handle that claimed it last (`segment.rs`), so an append costs nothing more.
use super::cluster::{Change, Cluster};
use super::layer::head_name;
use crate::error::layer_object;
use crate::{IoError, IoErrorCode, JournalWriter, LayerId, Result};
use std::ffi::CStr;

/// 20 digits, so that texts compare as numbers do.
const EPOCH_ATTRIBUTE: &CStr = c"atoll.epoch";
const OWNER_ATTRIBUTE: &CStr = c"atoll.owner";
/// So much of a text is noted.
const OWNER_BYTES_MAX: usize = 200;

/// A part of a change that makes an object.
pub(super) fn set_epoch(change: &mut Change, epoch: u64) {
    change.set_attribute(EPOCH_ATTRIBUTE, epoch_text(epoch).as_bytes());
}

/// A part of a change: it is refused with `ECANCELED` if a newer epoch is there; otherwise this one is from then on.
pub(super) fn raise_epoch(change: &mut Change, epoch: u64) {
    change.assert_attribute_at_most(EPOCH_ATTRIBUTE, epoch_text(epoch).as_bytes());
    set_epoch(change, epoch);
}

/// A part of a change: it is refused with `ECANCELED` unless an older epoch is there.
pub(super) fn assert_older_epoch(change: &mut Change, epoch: u64) {
    change.assert_attribute_less(EPOCH_ATTRIBUTE, epoch_text(epoch).as_bytes());
}

fn epoch_text(epoch: u64) -> String {
    format!("{epoch:020}")
}

/// One request: whoever has an older epoch makes no segment of this layer any more. `CatalogBehind` naming who has a newer one.
pub(super) fn claim(cluster: &Cluster, layer: LayerId, epoch: u64, owner: &str) -> Result<()> {
    let mut change = cluster.change();
    change.assert_exists();
    raise_epoch(&mut change, epoch);
    change.set_attribute(OWNER_ATTRIBUTE, cut(owner).as_bytes());
    change.even_if_full();
    match -cluster.start_change(&head_name(layer), change).wait() {
        errno if errno <= 0 => Ok(()),
        libc::ECANCELED => Err(superseded(layer, epoch, writer(cluster, layer).ok().flatten())),
        errno => Err(cluster.error("claim", layer_object(layer), 0, errno)),
    }
}

/// Who claimed it last; `None`: nobody.
pub(super) fn writer(cluster: &Cluster, layer: LayerId) -> Result<Option<JournalWriter>> {
    let head = head_name(layer);
    let text = |attribute| match cluster.attribute(&head, attribute) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(libc::ENODATA) => Ok(None),
        Err(errno) => Err(cluster.error("read", layer_object(layer), 0, errno)),
    };
    let Some(epoch) = text(EPOCH_ATTRIBUTE)?.and_then(|digits| digits.parse().ok()) else { return Ok(None) };
    Ok(Some(JournalWriter { epoch, owner: text(OWNER_ATTRIBUTE)?.unwrap_or_default() }))
}

pub(super) fn superseded(layer: LayerId, epoch: u64, by: Option<JournalWriter>) -> IoError {
    let by = by.map_or_else(|| "a newer one".to_owned(), |writer| format!("epoch {} by {}", writer.epoch, writer.owner));
    let message = format!("the journal was claimed under {by}, this is epoch {epoch}: the volume was opened elsewhere since");
    IoError::new(IoErrorCode::CatalogBehind, "claim", layer_object(layer), 0, message)
}

fn cut(owner: &str) -> &str {
    let mut end = owner.len().min(OWNER_BYTES_MAX);
    while !owner.is_char_boundary(end) {
        end -= 1;
    }
    &owner[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        assert_eq!(cut("pid 1"), "pid 1");
        let long = format!("{}é", "x".repeat(OWNER_BYTES_MAX - 1));
        assert_eq!(cut(&long).len(), OWNER_BYTES_MAX - 1);
    }
}

//! Sets the linker up for an addon: its Node symbols are found in the process that loads it.
fn main() {
    napi_build::setup();
}

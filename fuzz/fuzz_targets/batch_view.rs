//! Fuzzes the batch parser: any header with any body yields messages that lie within the body, or an error.
#![no_main]

use embarcadero_wire::BatchHeader;
use embarcadero_wire::batch::BatchView;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u32, u32, bool, Vec<u8>)| {
    let (payload_bytes, message_count, checksum, body) = input;
    let header = BatchHeader { payload_bytes, message_count, flags: checksum.into(), ..BatchHeader::blank() };
    if let Ok(view) = BatchView::parse(&header, &body) {
        assert_eq!(view.messages().map(<[u8]>::len).sum::<usize>(), payload_bytes as usize);
        assert_eq!(view.messages().count(), message_count as usize);
    }
});

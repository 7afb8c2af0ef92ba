//! Opcodes: the kinds of packets.

#[cfg(doc)]
use super::fields::{Aeth, Reth};

/// Defines [`Opcode`], and the conversions to and from its codes.
macro_rules! opcodes {
    ($($name:ident = $code:literal),* $(,)?) => {
        /// Opcode of a packet of a reliable connection (IBTA 9.2.1, table of opcodes), or of a congestion notification
        /// (A17.9.3).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Opcode {
            $($name = $code),*
        }

        impl Opcode {
            /// Every opcode.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Opcode of a code on the wire; `None` for one that reliable connections do not have.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                Some(match code {
                    $($code => Self::$name,)*
                    _ => return None,
                })
            }
        }
    };
}

opcodes! {
    SendFirst = 0x00,
    SendMiddle = 0x01,
    SendLast = 0x02,
    SendLastImmediate = 0x03,
    SendOnly = 0x04,
    SendOnlyImmediate = 0x05,
    WriteFirst = 0x06,
    WriteMiddle = 0x07,
    WriteLast = 0x08,
    WriteLastImmediate = 0x09,
    WriteOnly = 0x0a,
    WriteOnlyImmediate = 0x0b,
    ReadRequest = 0x0c,
    ReadResponseFirst = 0x0d,
    ReadResponseMiddle = 0x0e,
    ReadResponseLast = 0x0f,
    ReadResponseOnly = 0x10,
    Acknowledge = 0x11,
    CongestionNotification = 0x81,
}

use Opcode::{
    Acknowledge, ReadRequest, ReadResponseFirst, ReadResponseLast, ReadResponseMiddle, ReadResponseOnly, SendFirst,
    SendLast, SendLastImmediate, SendMiddle, SendOnly, SendOnlyImmediate, WriteFirst, WriteLast, WriteLastImmediate,
    WriteMiddle, WriteOnly, WriteOnlyImmediate,
};

/// Part of its message that a packet is.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    First,
    Middle,
    Last,
    Only,
}

impl Part {
    /// Part of a packet that begins its message, or ends it, or both.
    pub(crate) const fn of(begins: bool, ends: bool) -> Self {
        match (begins, ends) {
            (true, true) => Self::Only,
            (true, false) => Self::First,
            (false, false) => Self::Middle,
            (false, true) => Self::Last,
        }
    }
}

impl Opcode {
    /// Opcode of a part of a send. `immediate` says whether the message has immediate data.
    pub(crate) const fn send(part: Part, immediate: bool) -> Self {
        match (part, immediate) {
            (Part::First, _) => SendFirst,
            (Part::Middle, _) => SendMiddle,
            (Part::Last, false) => SendLast,
            (Part::Last, true) => SendLastImmediate,
            (Part::Only, false) => SendOnly,
            (Part::Only, true) => SendOnlyImmediate,
        }
    }

    /// Opcode of a part of a write. `immediate` says whether the message has immediate data.
    pub(crate) const fn write(part: Part, immediate: bool) -> Self {
        match (part, immediate) {
            (Part::First, _) => WriteFirst,
            (Part::Middle, _) => WriteMiddle,
            (Part::Last, false) => WriteLast,
            (Part::Last, true) => WriteLastImmediate,
            (Part::Only, false) => WriteOnly,
            (Part::Only, true) => WriteOnlyImmediate,
        }
    }

    /// Opcode of a part of the response to a read.
    pub(crate) const fn read_response(part: Part) -> Self {
        match part {
            Part::First => ReadResponseFirst,
            Part::Middle => ReadResponseMiddle,
            Part::Last => ReadResponseLast,
            Part::Only => ReadResponseOnly,
        }
    }

    /// Code on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Returns true when the packet has a [`Reth`], behind the base header.
    #[must_use]
    pub const fn has_reth(self) -> bool {
        matches!(self, WriteFirst | WriteOnly | WriteOnlyImmediate | ReadRequest)
    }

    /// Returns true when the packet has an [`Aeth`], behind the base header.
    #[must_use]
    pub const fn has_aeth(self) -> bool {
        matches!(self, Acknowledge | ReadResponseFirst | ReadResponseLast | ReadResponseOnly)
    }

    /// Returns true when the packet has immediate data, behind the [`Reth`] if there is one.
    #[must_use]
    pub const fn has_immediate(self) -> bool {
        matches!(self, SendLastImmediate | SendOnlyImmediate | WriteLastImmediate | WriteOnlyImmediate)
    }

    /// Returns true when more packets of the message follow. Such a packet is as long as the path takes (IBTA 9.7.4.1,
    /// length validation).
    #[must_use]
    pub(crate) const fn is_followed(self) -> bool {
        matches!(self, SendFirst | SendMiddle | WriteFirst | WriteMiddle | ReadResponseFirst | ReadResponseMiddle)
    }

    /// Returns true when the packet is a part of a send.
    #[must_use]
    pub(crate) const fn is_send(self) -> bool {
        matches!(self, SendFirst | SendMiddle | SendLast | SendLastImmediate | SendOnly | SendOnlyImmediate)
    }

    /// Returns true when the packet begins a message.
    #[must_use]
    pub(crate) const fn begins(self) -> bool {
        matches!(
            self,
            SendFirst
                | SendOnly
                | SendOnlyImmediate
                | WriteFirst
                | WriteOnly
                | WriteOnlyImmediate
                | ReadRequest
                | ReadResponseFirst
                | ReadResponseOnly
        )
    }
}
